"""Print a script that completes subcommands, flags and the names of configs in a shell.

One of these lines in ~/.bashrc, in ~/.zshrc after compinit, or in ~/.config/fish/config.fish:

  eval "$(warp-jax completion bash)"
  eval "$(warp-jax completion zsh)"
  warp-jax completion fish | source
"""

import importlib.util
import re
from pathlib import Path

from warp_jax import cli, commands

_FLAG = re.compile(r'\b(?:DEFINE_\w+|define_config)\(\s*"(\w+)"')
_BASH = """_warp_jax() {{
  local words configs="{configs}"
  if [[ $2 == --config=* ]]; then  # zsh; bash splits words at =
    COMPREPLY=($(compgen -P --config= -W "$configs" -- "${{2#*=}}"))
    return
  elif [[ $3 == --config || ( $3 == "=" && ${{COMP_WORDS[COMP_CWORD-2]}} == --config ) ]]; then words=$configs
  elif [[ $COMP_CWORD == 1 ]]; then words="{commands} --help --version"
  else case ${{COMP_WORDS[1]}} in
{cases}
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "${{2#=}}"))
}}
complete -o default -F _warp_jax warp-jax"""


def flag_names(module: str) -> list[str]:
    """Names of the flags that a module defines, read from its source: to import all modules would take seconds."""
    spec = importlib.util.find_spec(module)
    source = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
    return list(dict.fromkeys([*_FLAG.findall(source), "help"]))


def bash() -> str:
    """The script for bash."""
    flags = {name: flag_names(command.module) for name, command in commands.COMMANDS.items()}
    cases = "\n".join(f'    {name}) words="{" ".join(f"--{flag}" for flag in flags[name])}" ;;' for name in flags)
    return _BASH.format(configs=" ".join(cli.config_names()), commands=" ".join(flags), cases=cases)


def zsh() -> str:
    """The script for zsh, which can run that of bash."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash()}"


def fish() -> str:
    """The script for fish."""
    lines = []
    for name, command in commands.COMMANDS.items():
        lines.append(f"complete -c warp-jax -n __fish_use_subcommand -f -a {name} -d '{command.line}'")
        seen = f"complete -c warp-jax -n '__fish_seen_subcommand_from {name}'"
        for flag in flag_names(command.module):
            values = f" -x -a '{' '.join(cli.config_names())} (__fish_complete_path)'" if flag == "config" else ""
            lines.append(f"{seen} -l {flag}{values}")
    return "\n".join(lines)


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def main(argv: list[str]) -> None:
    """Print the script of the shell that is named."""
    if len(argv) != 2 or argv[1] not in SHELLS:
        cli.fail(f"completion: got {' '.join(argv[1:])!r}, want one of {', '.join(SHELLS)}")
    print(SHELLS[argv[1]]())


def start() -> None:
    """Parse the flags and run."""
    cli.run(main, required=(), example="bash", arguments=True)
