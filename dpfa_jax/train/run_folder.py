"""The folder of one run: what lies where, and who may write there."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from dpfa_jax.train import atomic
from dpfa_jax.train.config import TrainConfig, from_settings
from dpfa_jax.train.errors import RunError


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """Settings as asked for and as resolved; its presence makes the folder a run."""
        return self.path / "config.json"

    @property
    def ledger(self) -> Path:
        """Every release that was charged."""
        return self.path / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Training state, for `--resume`."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, for `dpfa predict`."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The result as numbers."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The result as a page to read."""
        return self.path / "report.html"

    def read(self) -> dict[str, Any]:
        """What `start` wrote. Errors: RunError where this is no run."""
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
            return {"config": content["config"], "resolved": content["resolved"]}
        except FileNotFoundError:
            if self.never_started():
                raise RunError(self.path, _NEVER_STARTED, _AGAIN) from None
            raise RunError(
                self.path, "holds no run", "Pass --out with the folder of a run."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(self.config, f"cannot be read ({error})", "Start a new run.") from error

    def ledger_heads(self) -> list[str]:
        """Heads that the ledger must hold: at the start, and at the report where there is one.

        Errors: RunError where a file that would tell does not.
        """
        places: list[tuple[Path, tuple[str, ...]]] = [(self.config, ("ledger_head",))]
        if self.report.exists():
            places.append((self.report, ("ledger", "head")))
        heads = []
        for file, names in places:
            try:
                value = json.loads(file.read_text(encoding="utf-8"))
                for name in names:
                    value = value[name]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RunError(
                    file,
                    f"does not name the head of the run's ledger ({error})",
                    "Restore it from a copy; without it nobody knows whether charges are missing.",
                ) from error
            heads.append(str(value))
        return heads

    def require_run(self) -> None:
        """Refuses what is no run, or has lost its ledger. Errors: RunError."""
        self.read()
        if not self.ledger.exists():
            raise RunError(
                self.ledger,
                "is missing, so nobody knows what this run has spent",
                "Restore it from a copy; without it the run cannot go on.",
            )

    def never_started(self) -> bool:
        """Whether a crash left a folder before its first step: settings unwritten, no charge.

        The settings are written after the ledger and before any charge, and each charge is a line
        of its own after the ledger's first.
        """
        if not self.path.is_dir():
            return False
        names = {file.name for file in self.path.iterdir()}
        if not names or not names <= {self.ledger.name, self.config.name + ".part"}:
            return False
        return not self.ledger.exists() or self.ledger.read_bytes().count(b"\n") <= 1

    def start(self, config: TrainConfig, resolved: dict[str, Any], *, ledger_head: str) -> None:
        """Makes the folder and writes the settings, bound to the new ledger. Errors: RunError."""
        content = {"config": config.settings(), "resolved": resolved, "ledger_head": ledger_head}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            atomic.write_json(self.config, content)
        except OSError as error:
            raise RunError(self.path, f"cannot be written ({error.strerror})", _PLACE) from error


_NEVER_STARTED = "was interrupted before its first step, and nothing was charged"
_AGAIN = "Delete this folder and start the run again, without --resume."
_PLACE = "Pass --out with a folder that you may write, on a disk with room."


def new_run_folder(config: TrainConfig) -> RunFolder:
    """The folder of a new run; nothing is made yet. Errors: RunError where it is taken."""
    if config.out is None:
        name = Path(config.data).stem or "data"
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path, twin = Path("runs") / f"{name}-{now}", 1
        while path.exists():
            twin += 1
            path = Path("runs") / f"{name}-{now}-{twin}"
        return RunFolder(path)
    folder = RunFolder(config.out)
    if folder.config.exists():
        raise RunError(
            config.out,
            "holds another run",
            "Pass --resume to go on with it, or --out with a new folder. Nothing was changed.",
        )
    if config.out.exists() and not config.out.is_dir():
        raise RunError(config.out, "is a file", "Pass --out with a folder. Nothing was changed.")
    if folder.never_started():
        raise RunError(config.out, _NEVER_STARTED, _AGAIN)
    if config.out.exists() and any(config.out.iterdir()):
        raise RunError(
            config.out, "is not empty", "Pass --out with a new folder. Nothing was changed."
        )
    return folder


def stored_config(path: Path) -> TrainConfig:
    """The settings of the run in `path`. Errors: RunError."""
    return from_settings(RunFolder(path).read()["config"], RunFolder(path).config)


def require_same_settings(folder: RunFolder, config: TrainConfig, resolved: dict[str, Any]) -> None:
    """Refuses to go on with a run under other settings. Errors: RunError that names each."""
    stored = folder.read()
    # A setting that the run's version did not know had what is now its default.
    stored["config"] = TrainConfig().settings() | stored["config"]
    now = {"config": config.settings(), "resolved": resolved}
    for part in ("config", "resolved"):
        before, after = stored[part], json.loads(json.dumps(now[part]))
        changed = [
            f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ]
        if changed:
            raise RunError(
                folder.path,
                f"was started with other settings ({'; '.join(changed)})",
                "Resume with the same settings, or start a new run with another --out.",
            )
