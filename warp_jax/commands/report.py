"""Write the report of one workdir again, or one report of several workdirs, finished or not.

  warp-jax report runs/quickstart
  warp-jax report --out=compared.html runs/seed0 runs/seed1 gs://bucket/runs/seed2

One workdir gets a new report.html. The report of several draws their fronts over each other, and has the tables of
warp-jax compare and the settings that differ. The held-out prompts are read again from the data of the config.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from warp_jax.evaluation import points, summary
    from warp_jax.experiment import preparation, status
    from warp_jax.experiment import workdir as workdirs
    from warp_jax.report import compared, data, page, writer

_OUT = flags.DEFINE_string("out", "", "HTML file to write; default: report.html in the workdir, if it is one.")
_KL = flags.DEFINE_float("kl", None, "KL (nats) at which methods are compared; default: 80 % of the shortest curve.", 0)


def read(workdir: Path) -> data.Results:
    """Read the results of a workdir up to now. Raises ValueError if SFT is not evaluated yet."""
    settings = workdirs.read_settings(workdir)
    finished = is_finished(workdir)
    found = points.read_points(workdir) if finished else points.saved_points(settings, workdir)
    if not found or found[0].stage != "sft":
        raise ValueError(f"{workdir}: want a workdir whose SFT policy is evaluated, for example a later one")
    numbers = summary.summarise(settings, found) if finished else None
    return data.make_results(settings, workdir, found, numbers)


def is_finished(workdir: Path) -> bool:
    """True if the workdir has the files of a finished job."""
    return all((workdir / name).is_file() for name in ("front.csv", "summary.json"))


def read_held_out(results: data.Results) -> data.HeldOut | str:
    """The held-out prompts of a workdir, or the reason why they are not shown."""
    settings, workdir = results.settings, results.workdir
    try:
        corpora = preparation.load_corpora(settings)
        workdirs.check_rows_unchanged(settings.data.source, corpora, workdir)
        tokenizer = preparation.read_tokenizer(settings, workdir / "tokenizer.json")
        prompts = preparation.make_prompts(settings, tokenizer, corpora["eval"], "eval")
    except (ValueError, OSError) as error:
        return f"The held-out prompts could not be read again: {error}."
    return data.HeldOut(tokenizer, preparation.examined_prompts(settings, prompts))


def build(found: list[Path]) -> str:
    """The page of all workdirs."""
    states = [status.progress(path) for path in found]
    results = [read(path) for path in found]
    tables = []
    if len(found) > 1:
        settings = {result.workdir.name: result.settings for result in results}
        tables = compared.tables([path for path in found if is_finished(path)], settings, _KL.value)
    pairs = zip(results, states, strict=True)
    return page.render([data.gather(result, read_held_out(result), state) for result, state in pairs], tables)


def main(argv: list[str]) -> None:
    """Check the workdirs and write the page."""
    try:
        found = [files.as_path(name) for name in argv[1:]]
        if not found:
            raise ValueError("want one or several workdirs, for example runs/quickstart")
        if len(found) > 1 and not _OUT.value:
            raise ValueError("--out: want the HTML file to write, for example --out=compared.html")
        if len({path.name for path in found}) < len(found):
            raise ValueError(f"want workdirs with different names, got {' '.join(argv[1:])}")
        out = files.as_path(_OUT.value) if _OUT.value else found[0] / writer.PAGE
        files.write_text(out, build(found))
    except (ValueError, OSError) as error:
        cli.fail(error)
    print(f"report: {out}")


def start() -> None:
    """Parse the flags and run."""
    cli.run(main, required=(), example="runs/quickstart", arguments=True)
