"""The process in which `second_reader` lets PyTorch read a file: run as a script, with a request in JSON, never imported.

Printed is `ready` when PyTorch has been imported, and then JSON: `{"entries": {name: [dtype, shape, SHA-256 of the values]}}` or
`{"refused": class of PyTorch's error}`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings


def limit(size: int) -> None:
    """Bound what is still to come by the size of the file: seconds of processor time, and memory."""
    try:
        import resource
    except ImportError:  # Windows has none; there the time of the whole process is bounded alone
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 5 + size // 50_000_000
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return
    most = taken + 4 * size + (512 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def read(path: str, wrappers: list[str]) -> dict[str, list]:
    """Read a file by PyTorch's `weights_only` loader, and describe the tensors of its state dict."""
    import torch

    with open(path, "rb") as file:  # PyTorch takes no names but of UTF-8
        value = torch.load(file, map_location="cpu", weights_only=True)
    for wrapper in wrappers:
        value = value[wrapper]
    entries = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        tensor = tensor.detach().resolve_neg().contiguous()
        if tensor.dtype == torch.bool:
            tensor = tensor.view(torch.uint8) != 0  # a file may have other bytes than 0 and 1
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        entries[name] = [kind, list(tensor.shape), hashlib.sha256(data.data).hexdigest()]
    return entries


def main(request: str) -> None:
    """Answer one request: `path`, `wrappers` (keys that the state dict stands under) and `bytes`, the file's size."""
    import torch  # before there are limits

    torch.set_num_threads(1)  # threads take memory, which is limited, by their number
    print("ready", flush=True)
    asked = json.loads(request)
    limit(asked["bytes"])
    warnings.simplefilter("ignore")
    try:
        answer = {"entries": read(asked["path"], asked["wrappers"])}
    except Exception as error:  # whatever PyTorch's many layers raise
        answer = {"refused": type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
