"""Tasks of lm-evaluation-harness (``lm_eval``) as a measure: its own prompts, metrics and groups, dense beside sparse.

Dense and sparse go the same way: :func:`~seerattention.evaluate.harness_model.harness_model`, an ``HFLM`` around
the model, and ``lm_eval.simple_evaluate``. ``lm_eval`` is an optional extra and imported when a task is asked for.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from ..measure import record
from .forward import check_batch_size
from .harness_model import harness_model
from .measure import Advance, Measure, Prompts, Subject
from .settings import Setting
from .tables import Table, finite, format_density

__all__ = ["HarnessMeasure", "HarnessResult", "HarnessScore", "HarnessTask", "harness_table", "require_lm_eval"]


@dataclass(frozen=True)
class HarnessScore:
    """One number that a task, or the mean over a group of tasks, came to.

    Attributes:
        task: the task's name, or the group's.
        group: whether it is a group's.
        metric, filter: as lm_eval calls them (``acc`` and ``none``).
        value: as lm_eval gives it; None where it is no finite number.
        standard_error: None where lm_eval tells none.
        samples: how many documents went in; None where lm_eval does not say.
    """

    task: str
    group: bool
    metric: str
    filter: str
    value: float | None
    standard_error: float | None
    samples: int | None

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.task} {self.metric}" + ("" if self.filter == "none" else f" ({self.filter})")


@dataclass(frozen=True)
class HarnessTask:
    """What one name of the command line came to: the scores of a task, or of a group or tag and of all in it.

    Attributes:
        name: as it was asked for.
        density: ``prompt_density`` over all its prompts: every layer and row, dense ones counted as 1, but no decoding
            steps.
        scores: those of groups first.
    """

    name: str
    density: float
    scores: Sequence[HarnessScore]

    def shown(self) -> list[HarnessScore]:
        """The scores of a table: those of groups where there are any, else of tasks."""
        return [score for score in self.scores if score.group] or list(self.scores)


@dataclass(frozen=True)
class HarnessResult:
    """All tasks in one setting.

    Attributes:
        setting: its name.
        density: as of a task, over all of them.
        tasks: one for each name that was asked for.
        options: how they were run: the version of lm_eval and the options of the measure.
    """

    setting: str
    density: float
    tasks: Sequence[HarnessTask]
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)

    def arrays(self) -> dict[str, np.ndarray]:
        """None: the numbers are all."""
        return {}


@dataclass(frozen=True)
class HarnessMeasure(Measure):
    """Tasks of lm-evaluation-harness as a measure, see :class:`~seerattention.evaluate.measure.Measure`.

    Attributes:
        lm_eval_tasks: names of tasks, groups or tags that lm_eval has, or YAML files of one's own.
        limit: documents of each task; None: all.
        num_fewshot: examples before each question; None: as the task has it.
        apply_chat_template: ask in the form of the tokenizer's chat template.
        max_seq_lengths: for tasks that make prompts as long as they are told to (RULER).
    """

    name: ClassVar[str] = "lm-eval"
    title: ClassVar[str] = "lm-evaluation-harness"
    needs_texts: ClassVar[bool] = False

    lm_eval_tasks: Sequence[str] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    max_seq_lengths: Sequence[int] = (4096,)

    def lengths(self, asked: Sequence[int]) -> Sequence[int]:
        """None of its own: tasks bring prompts of all lengths."""
        return [0]

    def prepare(self, subject: Subject, length: int) -> Prompts:
        """The tasks with their documents, loaded once for all settings.

        Raises:
            ModuleNotFoundError: ``lm_eval``, or what one of its tasks needs, is not installed.
            ValueError: a name that lm_eval does not know, no name, or a tokenizer without an end-of-text token.
        """
        lm_eval = require_lm_eval()
        if not self.lm_eval_tasks:
            raise ValueError("no task of lm-evaluation-harness was named")
        if subject.tokenizer.eos_token_id is None:
            raise ValueError("lm-evaluation-harness needs a tokenizer with an end-of-text token; set its eos_token")
        check_batch_size(subject.batch_size)
        facts = {"pretrained": subject.tokenizer.name_or_path, "max_seq_lengths": list(self.max_seq_lengths)}
        manager = _manager(json.dumps(facts))
        loaded = {name: _load(manager, name) for name in self.lm_eval_tasks}
        told: list[Any] = [lm_eval.__version__, str(getattr(subject.tokenizer, "chat_template", None))]
        tokens: list[int] = []
        requests = 0
        for found in loaded.values():
            for task in found["tasks"].values():
                instances = self._requests(task)
                requests += len(instances)
                told.append([task.dump_config(), [[each.doc, each.args] for each in instances]])
                tokens += [t for each in instances for t in _tokens(subject.tokenizer, each.args)]
        decides = {"tasks": _bytes(told), "tokens": np.asarray(tokens, dtype=np.int64)}
        tasks = _Tasks(manager, {name: _roots(found) for name, found in loaded.items()})
        return Prompts(tasks, decides, requests)

    def run(
        self, subject: Subject, prompts: Prompts, settings: Sequence[Setting], advance: Advance | None = None
    ) -> list[HarnessResult]:
        """Every task in each setting."""
        results = []
        options = {"lm_eval": require_lm_eval().__version__, **asdict(self)}
        options |= {name: list(options[name]) for name in ("lm_eval_tasks", "max_seq_lengths")}
        for setting in settings:
            steps = _Steps(advance, prompts.tokens)
            with setting.applied(subject.model) as measurement:
                tasks = [
                    self._run_task(subject, prompts.content, name, setting.sparse, steps)
                    for name in prompts.content.roots
                ]
            steps.finish()
            results.append(HarnessResult(setting.name, measurement.prompt_density, tasks, options))
        return results

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> HarnessResult:
        """A result that was kept."""
        tasks = [
            HarnessTask(task["name"], task["density"], [HarnessScore(**score) for score in task["scores"]])
            for task in numbers["tasks"]
        ]
        return HarnessResult(numbers["setting"], numbers["density"], tasks, numbers["options"])

    def table(self, results: Sequence[HarnessResult]) -> Table:
        """See :func:`harness_table`."""
        return harness_table(results)

    def _requests(self, task: Any) -> list[Any]:
        """What ``simple_evaluate`` asks the model in this task, but for the chat template."""
        own = task.get_config("num_fewshot")
        if own is None or (self.num_fewshot is not None and own != 0):  # a task that says 0 cannot have examples
            task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
        task.set_fewshot_seed(seed=_fewshot_seed())
        task.build_all_requests(limit=self.limit, rank=0, world_size=1)
        return task.instances

    def _run_task(self, subject: Subject, tasks: _Tasks, name: str, sparse: bool, steps: _Steps) -> HarnessTask:
        model = harness_model(subject.model, subject.tokenizer, subject.batch_size, sparse, steps)
        with _density(subject.model, sparse) as density:
            found = require_lm_eval().simple_evaluate(
                model=model,
                tasks=list(tasks.roots[name]),
                task_manager=tasks.manager,
                batch_size=subject.batch_size,
                limit=self.limit,
                apply_chat_template=self.apply_chat_template,
                log_samples=False,
            )
        return HarnessTask(name, density[0], _scores(found))


def harness_table(results: Sequence[HarnessResult]) -> Table:
    """Density beside the scores of each task or group that was asked for, one row a setting."""
    several = len(results[0].tasks) > 1
    headers = ["setting"]
    for task in results[0].tasks:
        headers += [
            f"{Path(task.name).stem} density" if several else "density",
            *(score.label for score in task.shown()),
        ]
    rows = []
    for result in results:
        cells = [result.setting]
        for task in result.tasks:
            cells += [format_density(task.density), *(_format_score(score) for score in task.shown())]
        rows.append(cells)
    caption = (
        "Tasks of lm-evaluation-harness: its metrics ± its standard errors. Density counts every row and layer of all "
        "prompts of a task, those of questions and of answers that are scored included."
    )
    return Table(headers, rows, caption)


@dataclass(frozen=True)
class _Tasks:
    """lm_eval's index of tasks, and what to hand to ``simple_evaluate`` for each name that was asked for."""

    manager: Any
    roots: Mapping[str, Sequence[Any]]


class _Steps:
    """Requests that are through, for a progress bar that ends where it should: HFLM runs some together, and some in
    several pieces."""

    def __init__(self, advance: Advance | None, total: int) -> None:
        self.advance, self.left = advance, total

    def __call__(self, amount: int) -> None:
        amount = min(amount, self.left)
        self.left -= amount
        if self.advance is not None and amount:
            self.advance(amount)

    def finish(self) -> None:
        """All are through."""
        self(self.left)


@contextmanager
def _density(model: nn.Module, sparse: bool) -> Iterator[list[float]]:
    """A list that holds the density of the block's prompts once it has ended."""
    found = [1.0]
    if not sparse:
        yield found
        return
    with record(model) as stats:
        yield found
    found[0] = float(stats.prompt_density)


def _format_score(score: HarnessScore) -> str:
    if score.value is None:
        return "-"
    return f"{score.value:.4f}" + ("" if score.standard_error is None else f" ± {score.standard_error:.4f}")


# ---- lm_eval -----------------------------------------------------------------------------------------------------


def require_lm_eval() -> Any:
    """The package ``lm_eval``.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ModuleNotFoundError(
            "tasks of lm-evaluation-harness need the lm_eval package: pip install "
            '"seerattention[lm-eval]" (or: pip install lm-eval)'
        ) from error
    return lm_eval


def _fewshot_seed() -> int:
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    return DEFAULT_OTHER_SEED


@functools.lru_cache(maxsize=1)
def _manager(facts: str) -> Any:
    """lm_eval's index of tasks, which takes seconds to make; ``facts`` (JSON) are told to the tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=json.loads(facts))


def _load(manager: Any, name: str) -> Mapping[str, Any]:
    """The tasks and groups behind a name, by their names."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no task file at {name}")
        if re.search(r"^group\s*:", Path(name).read_text(), re.MULTILINE):
            raise ValueError(f"{name} is a group; lm_eval finds only its own groups: name the files of its tasks")
    elif name not in manager.all_tasks:
        raise ValueError(
            f"lm-evaluation-harness has no task, group or tag {name!r}; `lm_eval ls tasks` lists them, and a task file "
            "of one's own is named by its path, with .yaml"
        )
    return manager.load([name])


def _roots(found: Mapping[str, Any]) -> list[Any]:
    """What to hand to ``simple_evaluate``: groups that are in no other one; without groups the tasks."""
    groups = found.get("groups") or {}
    children = {child for names in (found.get("group_map") or {}).values() for child in names}
    return [group for name, group in groups.items() if name not in children] or list(found["tasks"].values())


def _scores(found: Mapping[str, Any]) -> list[HarnessScore]:
    """Every number in what ``simple_evaluate`` returns; groups first."""
    groups = found.get("groups") or {}
    tasks = {name: numbers for name, numbers in found["results"].items() if name not in groups}
    return [
        score
        for is_group, named in ((True, groups), (False, tasks))
        for name, numbers in named.items()
        for score in _scores_of(name, numbers, is_group)
    ]


def _scores_of(name: str, numbers: Mapping[str, Any], is_group: bool) -> Iterator[HarnessScore]:
    samples = numbers.get("sample_len")
    for key, value in numbers.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if metric.isdecimal() and value == -1:  # RULER has a metric for each length, -1 where it was not asked for
            continue
        error = numbers.get(f"{metric}_stderr,{filter_}")
        told = finite(float(error)) if isinstance(error, int | float) else None
        yield HarnessScore(name, is_group, metric, filter_, finite(float(value)), told, samples)


def _tokens(tokenizer: Any, arguments: Sequence[Any]) -> list[int]:
    """Token ids of the texts of a request."""
    texts = [text for text in arguments if isinstance(text, str)]
    return [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]


def _bytes(told: Any) -> np.ndarray:
    """Anything as uint8, the same in every process; of functions and pictures the kind."""
    text = json.dumps(told, sort_keys=True, default=lambda value: type(value).__name__)
    return np.frombuffer(text.encode(), dtype=np.uint8)
