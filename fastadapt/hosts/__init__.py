"""How a module gets into a host model: one file per family of hosts, `roles` names the places."""

from fastadapt.hosts.roles import ROLES, Host, Place, families, find
from fastadapt.hosts.table import table

__all__ = ["ROLES", "Host", "Place", "families", "find", "table"]
