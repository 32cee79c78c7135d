# The pipeline of a study: each rule executes one notebook through papermill.
#
#   snakemake --cores 2 --config study=params/digits.yaml
#
# Which steps run is decided by kdlib.steps.done, from the evidence of each step and the study as it
# is now: the steps that are not finished read a file that is newer than their evidence, and for the
# others every input counts as older (`ancient`). Snakemake orders the steps.
# Evidence is marked `update`: a notebook that runs again keeps the runs whose settings and inputs are
# unchanged, so a new seed trains one seed. A changed notebook alone runs nothing again, but 06: a
# comment must not cost GPU days; ask with --forcerun RULE.
import os
import sys
import time
from pathlib import Path

from kdlib.repro import files, processor
from kdlib.steps.folders import recording_of_seed
from kdlib.study import load_study, study_file

files.settle()
PYTHON = sys.executable  # of this environment, whatever PATH says
STUDY = str(study_file(config.get("study", "params/digits.yaml")))
study = load_study(STUDY)
if study.compute.portable:
    processor.hold_children()


# Snakemake's own records (.snakemake) lie beside the runs, unless --directory says otherwise.
workdir: str(study.runs.parent)


def relative(path):
    """A path from the working directory: an absolute one may hold braces, which are wildcards."""
    return os.path.relpath(os.path.realpath(path))


study.runs.mkdir(parents=True, exist_ok=True)
RUNS = relative(study.runs)
UPSTREAM = relative(study.upstream.runs)  # images, teacher and datamap may be shared
# papermill takes braces in a path for parameters, and two of them for one
NOTEBOOKS = f"{workflow.basedir}/notebooks".replace("{", "{{").replace("}", "}}")
TEACHERS = study.shared_teachers[1:]
# without a recorded training there is no datamap, and nothing reads one
MAP = ["datamap"] if study.recorded_training else []
SHARED = [f"{UPSTREAM}/{step}/evidence.json" for step in ("cache", "teacher", *MAP)]
CACHE, TEACHER, *_ = SHARED
OF_SEEDS = []  # recordings by which each seed's subsets are chosen; 03 makes those of a shared study
if study.dynamics.per_seed and study.shares is None:
    names = [recording_of_seed(study, seed) for seed in study.seeds]
    OF_SEEDS = [f"{RUNS}/recorded/model={m}/{part}/evidence.json" for m, part in names]
SHARED += OF_SEEDS
FURTHER = [f"{RUNS}/teachers/{name}/evidence.json" for name in TEACHERS]
SUBSET = "student={student}/strategy={strategy}/{size}"
CELL = SUBSET + "/objective={objective}"
SEEDS = [f"seed={seed}" for seed in study.seeds]
RUNS_OF_SUBSET = [f"objective={o}/{seed}" for o in study.axes.objective for seed in SEEDS]
STUDENTS = [f"{RUNS}/distill/{SUBSET}/{run}/evidence.json" for run in RUNS_OF_SUBSET]
OF_CELL = [f"{RUNS}/distill/{CELL}/{seed}/evidence.json" for seed in SEEDS]
PROBED = f"{RUNS}/probe/{CELL}/evidence.json"
PAPERMILL = (
    "{PYTHON:q} -m kdlib.papermill_engine --log-output --no-progress-bar"
    " {NOTEBOOKS:q}/{params.notebook} {log.notebook:q} -p study {STUDY:q}"
)
AXES = (
    " -p student {wildcards.student:q} -p strategy {wildcards.strategy:q}"
    " -p {params.size}"
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


UNFINISHED = set()  # evidence of runs that are not finished
if workflow.is_main_process:  # one of them, where a job runs on another node
    from kdlib.steps.done import unfinished

    found = unfinished(study)
    if (study.runs / "audit" / "evidence.json").exists():  # by its name, though not of the study
        found |= unfinished(study, "audit")
    for folder in found:
        of_study = folder.is_relative_to(study.runs)
        runs, place = (study.runs, RUNS) if of_study else (study.upstream.runs, UPSTREAM)
        UNFINISHED.add(f"{place}/{folder.relative_to(runs)}/evidence.json")
NEWER = study.runs / ".unfinished"
if UNFINISHED or not NEWER.exists():  # its content differs from that of an earlier call
    files.write_atomic(NEWER, lambda file: file.write(str(time.time_ns()).encode()))
for path in filter(os.path.exists, UNFINISHED):
    if os.stat(path).st_mtime >= (now := NEWER.stat().st_mtime):  # evidence of a clock that is fast
        os.utime(path, (now - 1, now - 1))


def reading(rule, before, *evidence):
    """Inputs of a step by its wildcards: the evidence of all steps that come before it, directly or
    not. Where the step is finished and not forced, all count as older. Where it is not, the last
    one is newer, and none counts as older: Snakemake does not look at a step that comes after one
    that runs, but runs it if it reads that one's output."""

    def inputs(wildcards):
        paths = expand([*before, f"{RUNS}/{NEWER.name}"], **wildcards)
        runs = {rule, *expand(evidence, **wildcards)}
        if runs.isdisjoint(UNFINISHED) and runs.isdisjoint(workflow.dag_settings.forcerun):
            return [ancient(path) for path in paths]
        return paths

    return inputs


def size_parameter(wildcards):
    """The wildcard `fraction=0.33` or `shards=25` as papermill takes it."""
    return wildcards.size.replace("=", " ")


def students(cells):
    return [f"{RUNS}/distill/{cell.path}/{seed}/evidence.json" for cell in cells for seed in SEEDS]


wildcard_constraints:
    model="[^/]+",
    teacher="[^/]+",
    part="[^/]+",
    student="[^/]+",
    strategy="[^/]+",
    size=r"fraction=[0-9.e+-]+|shards=[0-9]+",
    objective="[^/]+",


localrules:
    all,


rule all:
    input:
        f"{RUNS}/compare/evidence.json",
        students(study.cells()),
        PROBES,
        QUESTIONS,


# Steps of one notebook and no parameter but the study: what comes before each, and how many processes
# with the study's threads, and GPUs, it has. All can be asked for by name: `snakemake scores`.
for step, folder, name, before, processes in (
    ("cache", UPSTREAM, "01_cache.ipynb", [], 0),
    ("teacher", UPSTREAM, "02_teacher.ipynb", [CACHE], study.compute.processes),
    ("datamap", UPSTREAM, "03_datamap.ipynb", [CACHE, TEACHER, *OF_SEEDS], 1),
    ("compare", RUNS, "06_compare.ipynb", [*SHARED, *FURTHER, *students(study.cells()), *PROBES], 0),
    ("scores", RUNS, "07_scores.ipynb", [CACHE, *RECORDINGS], 0),
    ("noise", RUNS, "08_noise.ipynb", [CACHE, *RECORDINGS], 0),
    ("audit", RUNS, "09_audit.ipynb", [CACHE], 1),
):
    of_tables = step in ("compare", "scores", "noise")  # made anew of runs
    evidence = f"{folder}/{step}/evidence.json"

    rule:
        name:
            step
        input:
            reading(step, before, evidence),
        output:
            evidence if of_tables else update(evidence),
        log:
            notebook=f"{folder}/{step}/{name}",
            text=f"{folder}/{step}/{Path(name).stem}.log",
        params:
            notebook=name,
        threads: study.compute.threads * processes or 1
        resources:
            **({"gpu": min(GPUS, processes)} if processes else {}),
        shell:
            PAPERMILL + LOG


rule further_teacher:
    input:
        reading("further_teacher", [CACHE], f"{RUNS}/teachers/{{teacher}}/evidence.json"),
    output:
        update(f"{RUNS}/teachers/{{teacher}}/evidence.json"),
    log:
        text=f"{RUNS}/teachers/{{teacher}}.log",  # beside the run, which may be archived
    threads: study.compute.threads * study.compute.processes
    resources:
        gpu=GPUS,
    shell:
        "{PYTHON:q} -m kdlib step teacher {STUDY:q} --teacher {wildcards.teacher:q}" + LOG


rule record:
    input:
        reading("record", [CACHE], f"{RUNS}/recorded/model={{model}}/{{part}}/evidence.json"),
    output:
        update(f"{RUNS}/recorded/model={{model}}/{{part}}/evidence.json"),
    log:
        text=f"{RUNS}/recorded/model={{model}}/{{part}}.log",  # beside the run, which may be archived
    threads: study.compute.threads
    resources:
        gpu=min(GPUS, 1),
    shell:
        "{PYTHON:q} -m kdlib record {STUDY:q} --model {wildcards.model:q} --part {wildcards.part:q}" + LOG


rule distill:
    input:
        reading("distill", [*SHARED, *FURTHER], *STUDENTS),
    output:
        update(STUDENTS),
    log:
        notebook=f"{RUNS}/distill/{SUBSET}/04_distill.ipynb",
        text=f"{RUNS}/distill/{SUBSET}/04_distill.log",
    params:
        notebook="04_distill.ipynb",
        size=size_parameter,
    threads: study.compute.threads * study.compute.processes
    resources:
        gpu=GPUS,
    shell:
        PAPERMILL + AXES + LOG


rule probe:
    input:
        reading("probe", [*SHARED, *FURTHER, *OF_CELL], PROBED),
    output:
        update(PROBED),
    log:
        notebook=f"{RUNS}/probe/{CELL}/05_probe.ipynb",
        text=f"{RUNS}/probe/{CELL}/05_probe.log",
    params:
        notebook="05_probe.ipynb",
        size=size_parameter,
    threads: study.compute.threads
    resources:
        gpu=min(GPUS, 1),
    shell:
        PAPERMILL + AXES + " -p objective {wildcards.objective:q}" + LOG
