"""`python -m train.report RUN`: test a checkpoint of a run and write its report."""

import argparse
import sys
from collections.abc import Sequence

from train.config import ConfigError
from train.config.files import local_path, with_absolute_paths
from train.run.workdir import load_run
from train.streams import mend_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 (a mistake in the command or in the run) or 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description="Test a checkpoint of a run and write its report: RUN/report.html, one page, and pictures in RUN/report/.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="best (highest test accuracy; the latest if none was tested), latest, or a step (default: best)",
    )
    mend_streams()
    arguments = parser.parse_args(argv)
    try:
        workdir = local_path(arguments.run, "RUN")
        config = with_absolute_paths(load_run(workdir))
        from train import loop  # late: it imports JAX

        print(f"Report: {loop.report(config, workdir, arguments.checkpoint)}")
    except (ConfigError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: no report was written: {error.filename or arguments.run}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
