"""The command ``jbilevel``: versions and devices, and what is in a saved file."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

from jbilevel._core import io

CORE = ("jax", "jaxlib", "numpy", "optax", "tqdm")
OPTIONAL = {  # by the extra that installs them; tomosipo has none
    "nets": ("flax", "equinox"),
    "data": ("pillow", "safetensors"),
    "examples": ("matplotlib", "scikit-image", "scikit-learn"),
    "ct": ("astra-toolbox",),
    "dfols": ("DFO-LS",),
    "by hand": ("tomosipo",),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (1: the file to show cannot be read)."""
    parser = argparse.ArgumentParser(prog="jbilevel", description="Bilevel learning for inverse problems in JAX.")
    parser.add_argument("--version", action="version", version=f"jbilevel {_version('jbilevel')}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, precision and installed extras (for bug reports)")
    show = commands.add_parser("show", help="structure and metadata of a file from jb.save or of a checkpoint")
    show.add_argument("file")
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        print("\n".join(_info()))
        return 0
    try:
        print(io.outline(chosen.file))
    except (OSError, ValueError, ImportError) as error:
        print(f"jbilevel: {error}", file=sys.stderr)
        return 1
    return 0


def _info() -> list[str]:
    import jax  # here: `show` and `--version` start no device

    lines = [f"jbilevel {_version('jbilevel')}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in CORE]
    lines += [f"devices: {', '.join(map(str, jax.devices()))} ({jax.default_backend()})"]
    lines += [f"64-bit numbers (jax_enable_x64): {'on' if jax.numpy.result_type(float) == 'float64' else 'off'}"]
    for extra, names in OPTIONAL.items():
        lines.append(f"extra {extra}: " + ", ".join(f"{name} {_version(name)}" for name in names))
    return lines


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
