"""The published task prompts: text that tells a shared adapter which task a sample is of."""

from __future__ import annotations

TASK_PROMPTS: dict[str, str] = {
    "vqa": "vqa: ",
    # The published spelling: released checkpoints were trained with it.
    "gqa": "gpa: ",
    "nlvr": "nlvr: ",
    "caption": "caption: ",
    "refcoco": "visual grounding: ",
    "mmt": "translate English to German: ",
    "cls": "cls: ",
}


def task_prompt(task: str) -> str:
    """The prefix that VL-Adapter and VL-PET put before a text of ``task`` (image tasks; ``f"{task_prompt(task)}{text}"``).

    Raises:
        ValueError: nothing is published for the task.
    """
    if task not in TASK_PROMPTS:
        raise ValueError(f"task: no prompt is published for {task!r}; known: {', '.join(TASK_PROMPTS)}")
    return TASK_PROMPTS[task]
