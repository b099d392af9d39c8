"""Small tasks in local files, such as a user has."""

import json
from pathlib import Path

CHOICES = """\
task: squares
dataset_path: json
dataset_kwargs: {data_files: {validation: squares.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: "{{[right, wrong]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm, aggregation: mean}]
metadata: {version: 3.0}
"""

ANSWERS = """\
task: cubes
dataset_path: json
dataset_kwargs: {data_files: {validation: squares.jsonl}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: "{{right}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

GROUP = """\
group: powers
task: [squares, more_squares]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


def write_tasks(folder: Path, count: int = 24) -> Path:
    """A folder with a task of choices, one of answers, and a group of two tasks of choices."""
    folder.mkdir()
    rows = [
        {"question": f"The square of {n} is", "right": f"{n * n}", "wrong": f"{n * n + 1 + n % 3}", "label": n % 2}
        for n in range(count)
    ]
    (folder / "squares.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "squares.yaml").write_text(CHOICES)
    (folder / "more_squares.yaml").write_text(CHOICES.replace("task: squares", "task: more_squares"))
    (folder / "cubes.yaml").write_text(ANSWERS)
    (folder / "powers.yaml").write_text(GROUP)
    return folder
