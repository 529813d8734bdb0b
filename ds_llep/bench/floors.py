from types import SimpleNamespace


def rates(path, device, dtype):
    return SimpleNamespace(dense_rate=5e10)


def of_parts(*a):
    return {}
