def reasons(call):
    return ["not built yet"]
