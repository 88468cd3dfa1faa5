"""adapters (task × seed) → experiment notebooks → result tables; `make book` makes the site from them.

    snakemake --cores all                            the quick profile: shipped adapters, few texts
    snakemake --cores all --config profile=full      the tables of data/results: three seeds, trained where missing
    snakemake --cores all --config profile=rehearsal the notebooks of gpu on random checkpoints of a few kilobytes
    snakemake --profile profiles/slurm --config profile=gpu accelerate=profiles/accelerate/one.yaml

What each notebook is run with stands in book/experiments/profiles.yaml. Whatever was finished is not done again:
adapters and notebooks by their files, single evaluations by content in the cache (`Evaluator(remember=True)`).
"""

import ast
import shlex
import sys
from pathlib import Path

import papermill
import yaml
from snakemake.exceptions import WorkflowError

NOTEBOOKS = Path("book/experiments")
PROFILES = yaml.safe_load((NOTEBOOKS / "profiles.yaml").read_text())
PROFILE = config.get("profile", "quick")
if PROFILE not in PROFILES:
    raise WorkflowError(f"profile is {PROFILE!r}, expected one of {', '.join(PROFILES)}")
EVERY = PROFILES[PROFILE].get("every", {})
RUNS = {  # a null takes a parameter of `every` away
    name: {k: v for k, v in (EVERY | (own or {})).items() if v is not None}
    for name, own in PROFILES[PROFILE]["notebooks"].items()
}
OUT = f"_build/{PROFILE}"
TASKS = ["ng-comp", "ng-rec", "ng-sci", "ng-politics", "ng-religion", "reuters-r8", "reuters-rare", "tweets"]
PACKAGE = sorted(map(str, Path("lora_opcm").rglob("*.py")))


def parameters(name):
    """Every parameter of a run; papermill itself would only warn about one the notebook does not have."""
    known = papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")
    given = RUNS[name] | {"profile": PROFILE}
    given |= {k: config[k] for k in ("texts",) if k in config and k in given}
    if unknown := set(given) - set(known):
        raise WorkflowError(f"{name}.ipynb has no parameter {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return {k: ast.literal_eval(about["default"]) for k, about in known.items()} | given, given


ALL, GIVEN = {}, {}
for name in RUNS:
    ALL[name], GIVEN[name] = parameters(name)

TRAINING = ("sources", "rank", "steps", "batch_size", "device_batch", "quantise")  # parameters that training shares
GROWN = {}  # where under _build -> options of lab.train, for adapters of other bases than the book's own
for name, given in ALL.items():
    for base in given.get("bases", []):
        options = {"base": base} | {k: given[k] for k in TRAINING if given.get(k)}
        where = f"{PROFILE}/adapters/{base.split('/')[-1]}"
        GROWN[where] = " ".join(f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in options.items())
FILES = ["adapter_model.safetensors", "adapter_config.json", "training.json"]  # of an adapter
LAUNCH = f"-m accelerate.commands.launch --config_file {config['accelerate']}" if "accelerate" in config else ""


def trained(name):
    """The adapters a notebook needs that do not ship with the package."""
    given = ALL[name]
    if "bases" not in given:
        wanted = [("adapters", seed, task) for seed in given.get("seeds", []) if seed for task in TASKS]
    else:
        wanted = [
            (f"{PROFILE}/adapters/{base.split('/')[-1]}", seed, task)
            for base in given["bases"] for seed in given["seeds"] for task in given["tasks"]
        ]
    return [f"_build/{where}/seed{seed}/{task}/{file}" for where, seed, task in wanted for file in FILES]


def told(wildcards, input, output):
    """The parameters of a run as papermill takes them, with the places where this job finds and leaves its files."""
    given = GIVEN[wildcards.name] | {"results": str(Path(output.results).parent)}
    if "bases" in ALL[wildcards.name]:
        given |= {"adapters": str(Path(input.adapters[0]).parents[3])}
    return yaml.safe_dump(given, default_flow_style=True, width=10_000).strip()


def made(wildcards):
    """The checkpoints and data of a rehearsal."""
    return f"{OUT}/tiny" if PROFILE == "rehearsal" else []


def published(wildcards):
    """The quick profile shows the published tables beside its own."""
    path = Path(f"data/results/{wildcards.name}.csv")
    return [local(str(path))] if PROFILE == "quick" and path.exists() else []


rule all:
    input:
        [f"{OUT}/executed/{name}.ipynb" for name in RUNS],
        sorted({path for name in RUNS for path in trained(name)}),  # asked for by name: one that is deleted comes back
    message: "all of the profile is there"


rule tiny:
    input: local("lora_opcm/lab/bases/tiny.py")
    output: directory("_build/rehearsal/tiny")
    log: "_build/logs/tiny.log"
    message: "checkpoints and data of a rehearsal"
    shell: "{sys.executable} -m lora_opcm.lab.bases.tiny {output} > {log} 2>&1"


rule adapter:
    input: made
    output: expand("_build/{{where}}/seed{{seed}}/{{task}}/{file}", file=FILES)
    log: "_build/logs/{where}/seed{seed}-{task}.log"
    message: "adapter of {wildcards.task}, seed {wildcards.seed}, in {wildcards.where}"
    params: options=lambda wildcards: GROWN.get(wildcards.where, "")
    wildcard_constraints: seed=r"\d+", task=r"[^/]+"
    threads: workflow.cores
    retries: 1  # an interrupted training goes on from its checkpoint
    shell:
        "{sys.executable} {LAUNCH} -m lora_opcm.lab.train $(dirname $(dirname {output[0]}))"
        " --task {wildcards.task} --seed {wildcards.seed} {params.options} > {log} 2>&1"


rule notebook:
    input:
        notebook=local(f"{NOTEBOOKS}/{{name}}.ipynb"), package=local(PACKAGE), manifest=local("data/adapters/manifest.json"),
        adapters=lambda wildcards: trained(wildcards.name), published=published, tiny=made,
    output: executed=f"{OUT}/executed/{{name}}.ipynb", results=f"{OUT}/results/{{name}}.csv"
    log: f"{OUT}/logs/{{name}}.log", notebook=f"{OUT}/logs/{{name}}.ipynb"  # where it failed, cell by cell
    params: given=told
    message: "experiment {wildcards.name}"  # and no list of the inputs, which are all of the package
    priority: lambda wildcards: wildcards.name == "bake_off"  # the longest
    threads: 1 if PROFILE == "quick" else workflow.cores  # small texts: side by side; a measured run has the machine to itself
    shell:
        "OMP_NUM_THREADS={threads} {sys.executable} -m papermill --progress-bar --kernel python3 -y {params.given:q} {input.notebook} {log.notebook} 2>&1 | tee {log[0]}"
        " && cp {log.notebook} {output.executed}"
