"""EleutherAI's lm-evaluation-harness against the server: scores and texts are those of the engine.

It comes with the extra `harness`, not with the tests: 200 MB that only this needs.
"""

import json
import os
import subprocess
import sys

import pytest
from api_server import serve
from serving import NAME

from moe_lm.data.tokenizer import save_tokenizer

CHOICES = {
    "def main(": ["):", "self):", "x, 12345)"],
    "the quick": ["brown fox", "fox", "naïve 😀"],
    "return 0": ["times", "0"],
    "12, 3": ["345 times", "0", "brown", "the quick brown fox"],
    "fox,": ["return", "12345 times"],
}
"""Prompts and how they may go on."""
UNTIL = {"12345 times": ["\n", "e"], "def main(": ["x"], "the quick brown": [], "naïve": [" ", "a", "\t"]}
"""Prompts and what ends the answers to them."""
MOST_TOKENS = 24

CHOOSE = """\
task: toy_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{prompt}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: {most}, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def write_tasks(directory):
    """A task of choices, and one of generation for each prompt of UNTIL, whose stop strings are the task's."""
    docs = [{"prompt": prompt, "choices": choices} for prompt, choices in CHOICES.items()]
    (directory / "choose.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (directory / "choose.yaml").write_text(CHOOSE.format(file=directory / "choose.jsonl"))
    names = {}
    for number, (prompt, until) in enumerate(UNTIL.items()):
        file, names[prompt] = directory / f"write{number}.jsonl", f"toy_write{number}"
        file.write_text(json.dumps({"prompt": prompt}) + "\n")
        text = WRITE.format(task=names[prompt], file=file, until=json.dumps(until), most=MOST_TOKENS)
        (directory / f"write{number}.yaml").write_text(text)
    return names


def run_harness(directory, url, tasks, batch_size, **model_args):
    """The samples that it logs, by task."""
    model_args = {
        "model": NAME, "base_url": f"{url}/v1/completions", "tokenizer": directory / "tokenizer",
        "tokenizer_backend": "huggingface", "max_length": 512, "max_retries": 1, **model_args,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in model_args.items()),
        "--tasks", ",".join(tasks), "--include_path", directory, "--output_path", directory / "out", "--log_samples",
        "--batch_size", str(batch_size),
    ]  # fmt: skip
    offline = {f"{name}_OFFLINE": "1" for name in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")}
    own = {"HF_HOME": str(directory / "cache"), "OPENAI_API_KEY": "x"}
    done = subprocess.run(command, env=os.environ | offline | own, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for task in tasks:
        [file] = (directory / "out").rglob(f"samples_{task}_*.jsonl")
        found[task] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return found


def score(api, prompt, choice):
    """What a continuation has, the sum of its tokens' log-probabilities and whether each is the likeliest one."""
    ids = api.tokenizer.encode(f"{prompt} {choice}").ids
    [output] = api.expected(ids, max_tokens=0, prompt_logprobs=1)
    own = output.prompt_logprobs[len(api.tokenizer.encode(prompt).ids) :]
    return sum(each.logprob for each in own), all(each.logprob == each.top[0][1] for each in own)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "options",
    [{"batch_size": 4, "num_concurrent": 3}, {"batch_size": 1, "tokenized_requests": False}],
    ids=["batches of tokens", "one text at a time"],
)
def test_the_harness_finds_what_the_engine_finds(tokenizer, tmp_path, options):
    save_tokenizer(tokenizer, tmp_path / "tokenizer", 512)
    names = write_tasks(tmp_path)
    with serve(tokenizer, tmp_path / "tokenizer") as api:
        found = run_harness(tmp_path, api.live.url, ["toy_choose", *names.values()], **options)
        assert len(found["toy_choose"]) == len(CHOICES)
        for sample in found["toy_choose"]:
            prompt, scores = sample["doc"]["prompt"], sample["filtered_resps"]
            expected = [score(api, prompt, choice) for choice in CHOICES[prompt]]
            assert [(float(value), str(greedy) == "True") for value, greedy in scores] == expected
        for prompt, task in names.items():
            [expected] = api.expected(prompt, max_tokens=MOST_TOKENS, temperature=0, stop=tuple(UNTIL[prompt]))
            [sample] = found[task]
            assert sample["filtered_resps"] == [expected.text]
            assert sample["resps"] == [[expected.text]]
