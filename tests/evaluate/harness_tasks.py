"""Two tasks of one's own for lm-evaluation-harness: a YAML file each, and documents in JSON lines."""

import json
from pathlib import Path

from .tiny import make_text

CHOICES = ["the silver river", "a captain stood near the old house", "rain", "nobody came but the wind"]

_COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
  cache_dir: "{cache}"
test_split: test
fewshot_split: test
doc_to_text: "{{{{text}}}} answer:"
"""
_CHOICE = """\
task: toy_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_GENERATE = """\
task: toy_generate
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def make_documents(count=5):
    """Of quite different lengths, about 100 tokens and more."""
    return [
        {"text": make_text(100 + 37 * i, seed=i), "choices": CHOICES, "answer": i % len(CHOICES)} for i in range(count)
    ]


def write_group(folder):
    """Files of a group ``toys`` of two tasks, with their mean, for an index of tasks that includes the folder."""
    task = Path(write_tasks(folder)[0]).read_text()
    for name in ("toy_a", "toy_b"):
        (folder / f"{name}.yaml").write_text(task.replace("toy_choice", name))
    (folder / "toys.yaml").write_text("group: toys\ntask: [toy_a, toy_b]\naggregate_metric_list: [{metric: acc}]\n")


def write_tasks(folder):
    """Paths of a multiple-choice task and of one that generates."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in make_documents()))
    common = _COMMON.format(data=data, cache=folder / "cache")
    paths = []
    for name, task in (("choice", _CHOICE), ("generate", _GENERATE)):
        paths.append(str(folder / f"{name}.yaml"))
        (folder / f"{name}.yaml").write_text(task + common)
    return paths
