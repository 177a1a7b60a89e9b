"""``diffit info``: what this installation is and can run, for a look and for bug reports."""

from __future__ import annotations

import argparse

HELP = "show versions, devices, and which backends run here, with the reason where one does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(arguments: argparse.Namespace) -> None:
    """Print it.

    Raises:
        ValueError: ``DIFFIT_BACKEND`` names no backend.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import diffit
    from diffit_kernels import available_backends, dispatch, native

    def show(name: str, value: object) -> None:
        print(f"  {name:16} {value}")

    print("versions")
    show("diffit", diffit.__version__)
    show("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    show("torch", torch.__version__)
    for package, why in {
        "numpy": "",
        "pillow": "",
        "safetensors": "",
        "huggingface_hub": "",
        "triton": " (needed by the triton backend)",
        "diffusers": " (needed by latent networks: pip install 'diffit[latent]')",
    }.items():
        try:
            show(package, version(package))
        except PackageNotFoundError:
            show(package, f"not installed{why}")

    print("devices")
    isa = native.instruction_set() or torch.backends.cpu.get_cpu_capability()
    show("cpu", f"{torch.get_num_threads()} threads, {isa}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        show(f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")

    print("backends")
    for backend, reason in available_backends().items():
        show(backend, "runs" if reason is None else f"does not run: {reason}")
    show("asked for", dispatch.choice())
