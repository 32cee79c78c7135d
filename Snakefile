# The pipeline of a study: each rule executes one notebook through papermill.
#
#   snakemake --cores 2 --config study=params/digits.yaml
#
# A step is done when its evidence file is there (the notebooks rename it into place last), never by
# the look of a notebook. Evidence is marked `update`: a notebook that runs again keeps the runs whose
# settings and inputs are unchanged, so a new seed trains one seed. A rule runs again when the settings
# it reads change, or when a step before it wrote other evidence. A changed notebook alone does not
# (`ancient`): a comment must not cost GPU days; ask with --forcerun RULE.
import os
from pathlib import Path

from kdlib.repro import files, processor
from kdlib.study import load_study, study_file

# Not a rule's parameter: where the file lies does not change what it asks for.
STUDY = str(study_file(config.get("study", "params/digits.yaml")))
study = load_study(STUDY)
if study.compute.portable:
    processor.hold_children()
NOTEBOOKS = Path(workflow.basedir) / "notebooks"
RUNS = os.path.relpath(study.runs)
UPSTREAM = os.path.relpath(study.upstream.runs)  # images, teacher and datamap may be shared
TEACHERS = [n for n, t in study.teachers.items() if not t.of_subset]
CACHE, TEACHER, DATAMAP = (
    f"{UPSTREAM}/{step}/evidence.json" for step in ("cache", "teacher", "datamap")
)
FURTHER = [f"{RUNS}/teachers/{name}/evidence.json" for name in TEACHERS]
SUBSET = "student={student}/strategy={strategy}/fraction={fraction}"
CELL = SUBSET + "/objective={objective}"
SEEDS = [f"seed={seed}" for seed in study.seeds]
RUNS_OF_SUBSET = [f"objective={o}/{seed}" for o in study.axes.objective for seed in SEEDS]
PAPERMILL = (
    "papermill --engine ipc --log-output --no-progress-bar {input.notebook:q} {log.notebook:q}"
    " -p study {STUDY:q}"
)
AXES = (
    " -p student {wildcards.student:q} -p strategy {wildcards.strategy:q}"
    " -p fraction {wildcards.fraction}"
)
LOG = " > {log.text:q} 2>&1"


# What a job asks of a cluster beside its threads; memory and time are the profile's (profiles/slurm).
GPUS = study.compute.processes if study.compute.device.startswith("cuda") else 0

PROBES = [f"{RUNS}/probe/{cell.path}/evidence.json" for cell in study.probed_cells()]
RECORDED = [f"model={m}/{part}" for m, part in (study.recordings.runs() if study.recordings else [])]
RECORDINGS = [f"{RUNS}/recorded/{run}/evidence.json" for run in RECORDED]
QUESTIONS = [f"{RUNS}/scores/evidence.json"] if study.recordings else []
if study.recordings and study.data.relabel:
    QUESTIONS.append(f"{RUNS}/noise/evidence.json")
if study.audit:
    QUESTIONS.append(f"{RUNS}/audit/evidence.json")


def settings(step):
    """Fingerprint of what a step reads; Snakemake runs the step again when it changes."""

    def of(wildcards):
        if step == "further_teacher":
            return files.fingerprint(study.step_settings("teacher", teacher=wildcards.teacher))
        if step in ("cache", "teacher", "datamap"):
            return files.fingerprint(study.upstream.step_settings(step))
        if step != "distill":
            return files.fingerprint(study.step_settings(step))
        fraction = float(wildcards.fraction)
        cell = study.cell(
            student=wildcards.student, strategy=wildcards.strategy, fraction=fraction
        )
        return files.fingerprint([study.step_settings(step, c) for c in study.same_subset(cell)])

    return of


def notebook(name, changes=False):
    """A notebook as input; `changes`: the step is made again when it changes."""
    path = str(NOTEBOOKS / name)
    return path if changes else ancient(path)


def students(cells):
    return [f"{RUNS}/distill/{cell.path}/{seed}/evidence.json" for cell in cells for seed in SEEDS]


wildcard_constraints:
    model="[^/]+",
    teacher="[^/]+",
    part="[^/]+",
    student="[^/]+",
    strategy="[^/]+",
    fraction=r"[0-9.e+-]+",
    objective="[^/]+",


localrules:
    all,


rule all:
    input:
        f"{RUNS}/compare/evidence.json",
        students(study.cells()),
        PROBES,
        QUESTIONS,


# Steps of one notebook and no parameter but the study: what each waits for, and how many processes
# with the study's threads, and GPUs, it has. All can be asked for by name: `snakemake scores`.
for step, folder, name, waits, processes in (
    ("cache", UPSTREAM, "01_cache", [], 0),
    ("teacher", UPSTREAM, "02_teacher", [CACHE], study.compute.processes),
    ("datamap", UPSTREAM, "03_datamap", [TEACHER], 1),
    ("compare", RUNS, "06_compare", [DATAMAP, students(study.cells()), PROBES], 0),
    ("scores", RUNS, "07_scores", RECORDINGS, 0),
    ("noise", RUNS, "08_noise", RECORDINGS, 0),
    ("audit", RUNS, "09_audit", [CACHE], 1),
):
    of_tables = step in ("compare", "scores", "noise")  # made anew of runs
    evidence = f"{folder}/{step}/evidence.json"

    rule:
        name:
            step
        input:
            waits,
            notebook=notebook(f"{name}.ipynb", changes=step == "compare"),
        output:
            evidence if of_tables else update(evidence),
        log:
            notebook=f"{folder}/{step}/{name}.ipynb",
            text=f"{folder}/{step}/{name}.log",
        params:
            settings=settings(step),
        threads: study.compute.threads * processes or 1
        resources:
            **({"gpu": min(GPUS, processes)} if processes else {}),
        shell:
            PAPERMILL + LOG


rule further_teacher:
    input:
        CACHE,
    output:
        update(f"{RUNS}/teachers/{{teacher}}/evidence.json"),
    log:
        text=f"{RUNS}/teachers/{{teacher}}.log",  # beside the run, which may be archived
    params:
        settings=settings("further_teacher"),
    threads: study.compute.threads * study.compute.processes
    resources:
        gpu=GPUS,
    shell:
        "python -m kdlib step teacher {STUDY:q} --teacher {wildcards.teacher:q}" + LOG


rule record:
    input:
        CACHE,
    output:
        update(f"{RUNS}/recorded/model={{model}}/{{part}}/evidence.json"),
    log:
        text=f"{RUNS}/recorded/model={{model}}/{{part}}.log",  # beside the run, which may be archived
    params:
        settings=settings("record"),
    threads: study.compute.threads
    resources:
        gpu=min(GPUS, 1),
    shell:
        "python -m kdlib record {STUDY:q} --model {wildcards.model:q} --part {wildcards.part:q}" + LOG


rule distill:
    input:
        TEACHER,
        FURTHER,
        DATAMAP,
        notebook=notebook("04_distill.ipynb"),
    output:
        update(
            expand(
                f"{RUNS}/distill/{SUBSET}/{{run}}/evidence.json",
                run=RUNS_OF_SUBSET,
                allow_missing=True,
            )
        ),
    log:
        notebook=f"{RUNS}/distill/{SUBSET}/04_distill.ipynb",
        text=f"{RUNS}/distill/{SUBSET}/04_distill.log",
    params:
        settings=settings("distill"),
    threads: study.compute.threads * study.compute.processes
    resources:
        gpu=GPUS,
    shell:
        PAPERMILL + AXES + LOG


rule probe:
    input:
        expand(f"{RUNS}/distill/{CELL}/{{seed}}/evidence.json", seed=SEEDS, allow_missing=True),
        notebook=notebook("05_probe.ipynb"),
    output:
        update(f"{RUNS}/probe/{CELL}/evidence.json"),
    log:
        notebook=f"{RUNS}/probe/{CELL}/05_probe.ipynb",
        text=f"{RUNS}/probe/{CELL}/05_probe.log",
    params:
        settings=settings("probe"),
    threads: study.compute.threads
    resources:
        gpu=min(GPUS, 1),
    shell:
        PAPERMILL + AXES + " -p objective {wildcards.objective:q}" + LOG
