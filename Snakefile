"""adapters (task × seed) → experiment notebooks → result tables; `make book` makes the site from them.

    snakemake --cores all                            the quick profile: shipped adapters, few texts
    snakemake --cores all --config profile=full      the published run: three seeds, trained where missing
    snakemake --profile profiles/slurm --config profile=gpu

What each notebook is run with stands in book/experiments/profiles.yaml. Whatever was finished is not done again:
adapters and notebooks by their files, single evaluations by content in the cache (`Evaluator(remember=True)`).
"""

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
PACKAGE = sorted(map(str, [*Path("lora_opcm").glob("*.py"), *Path("lora_opcm/lab").glob("*.py")]))


def parameters(name):
    """Every parameter of a run; papermill itself would only warn about one the notebook does not have."""
    given = RUNS[name] | {"profile": PROFILE, "results": f"{OUT}/results"}
    given |= {k: config[k] for k in ("texts",) if k in config and k in given}
    known = set(papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb"))
    if unknown := set(given) - known:
        raise WorkflowError(f"{name}.ipynb has no parameter {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return yaml.safe_dump(given, default_flow_style=True, width=10_000).strip()


PARAMETERS = {name: parameters(name) for name in RUNS}


def trained(name):
    """The adapters a notebook needs that do not ship with the package."""
    seeds = RUNS[name].get("seeds", [])
    return [f"_build/adapters/seed{seed}/{task}/adapter_model.safetensors" for seed in seeds if seed for task in TASKS]


def published(wildcards):
    """The quick profile shows the published tables beside its own."""
    path = Path(f"data/results/{wildcards.name}.csv")
    return [str(path)] if PROFILE == "quick" and path.exists() else []


rule all:
    input:
        [f"{OUT}/executed/{name}.ipynb" for name in RUNS],
        sorted({path for name in RUNS for path in trained(name)}),  # asked for by name: one that is deleted comes back


rule adapter:
    output: "_build/adapters/seed{seed}/{task}/adapter_model.safetensors"
    log: "_build/logs/seed{seed}-{task}.log"
    threads: workflow.cores
    retries: 1  # an interrupted training goes on from its checkpoint
    shell: "{sys.executable} -m lora_opcm.lab.train _build/adapters/seed{wildcards.seed} --task {wildcards.task} --seed {wildcards.seed} > {log} 2>&1"


rule notebook:
    input:
        notebook=f"{NOTEBOOKS}/{{name}}.ipynb", package=PACKAGE, manifest="data/adapters/manifest.json",
        adapters=lambda wildcards: trained(wildcards.name), published=published,
    output: f"{OUT}/executed/{{name}}.ipynb"
    log: f"{OUT}/logs/{{name}}.log", notebook=f"{OUT}/logs/{{name}}.ipynb"  # where it failed, cell by cell
    params: given=lambda wildcards: PARAMETERS[wildcards.name]
    threads: workflow.cores
    shell:
        "{sys.executable} -m papermill --progress-bar --kernel python3 -y {params.given:q} {input.notebook} {log.notebook} 2>&1 | tee {log[0]}"
        " && cp {log.notebook} {output}"
