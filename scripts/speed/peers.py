"""The programs that warp_jax is measured against, each with an environment of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from speed.sides import last_line

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "warp_jax" / "peers"


class Peer(NamedTuple):
    """A program in scripts/speed, the packages that it needs, and the stages that it has."""

    program: str
    requirements: tuple[str, ...]
    stages: tuple[str, ...]


TORCH = ("torch==2.13.0", "transformers==5.24.0")
PEERS = {
    "torch": Peer("with_torch.py", TORCH, ("decode", "score", "update", "rl_step", "merge")),
    "trl": Peer("with_trl.py", (*TORCH, "trl==1.16.0"), ("rl_step",)),
    "llama_cpp": Peer("with_llama_cpp.py", ("llama-cpp-python==0.3.36", "gguf==0.19.0"), ("decode",)),
    "tunix": Peer("with_tunix.py", ("google-tunix==0.1.7", "jax==0.10.2"), ("rl_step",)),
}
ONE_LENGTH = ("llama_cpp", "tunix")  # their completions cannot differ in length
MERGEKIT = ("torch==2.13.0", "mergekit==0.1.5", "pydantic<2.11")  # for scripts/merge_benchmark.py


def python_of(name: str, requirements: tuple[str, ...], folder: Path) -> Path:
    """Python of a virtual environment with these packages, made in folder / name unless it is there.

    Raises RuntimeError, one line, if a package cannot be installed.
    """
    environment = folder / name
    marker, content = environment / "requirements.txt", "\n".join(requirements)
    python = environment / "bin" / "python"
    if marker.exists() and marker.read_text() == content:
        return python
    if environment.exists():
        shutil.rmtree(environment)
    print(f"making {environment} with {' '.join(requirements)}: some minutes, once", file=sys.stderr, flush=True)
    install = [python, "-m", "pip", "install", "--quiet", *requirements]
    for command in ([sys.executable, "-m", "venv", environment], *([install] if requirements else [])):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = last_line(ended.stderr.strip() or ended.stdout)
            raise RuntimeError(f"{name}: {' '.join(map(str, command))} failed: {last}")
    marker.write_text(content)
    return python
