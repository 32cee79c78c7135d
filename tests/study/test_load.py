"""`kdlib.study.load`: a study is exactly what its file says, or a StudyError that says why not."""

import copy

import pytest
import yaml
from a_study import STUDY, changed, validated
from tiny import ROOT

from kdlib.study.base import StudyError
from kdlib.study.load import load_study


def test_a_study_says_what_its_file_says_and_takes_its_name(write):
    study = load_study(write(STUDY))
    assert study.name == "case"
    assert study.students["wide"].model.options == {"width": 16}
    assert study.training.steps == 20
    assert study.axes.fraction == (0.33, 0.1)
    assert study.seeds == (0, 1)
    assert study == validated(STUDY)


def test_a_study_is_found_from_the_workspace_and_from_the_current_folder(
    write, home, tmp_path_factory, monkeypatch
):
    write(STUDY)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_study("params/case.yaml").name == "case"
    monkeypatch.chdir(home / "params")
    assert load_study("case.yaml").name == "case"


def test_a_missing_file_lists_the_studies_there_are(write, home):
    with pytest.raises(FileNotFoundError, match=r"no study file 'nope\.yaml'; params/ has none"):
        load_study("nope.yaml")
    write(STUDY)
    (home / "params/also.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"params/ has also\.yaml, case\.yaml"):
        load_study("params/nope.yaml")


def test_the_studies_of_this_repository_are_valid():
    found = sorted((ROOT / "params").glob("*.yaml"))
    assert found
    for path in found:
        assert load_study(path).cells()


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        validated(STUDY).training.steps = 1


SECTIONS = {  # where a key may stand: a section's path, a known key of it, and a typo of that key
    "": ("teacher", "techer"),
    "data": ("n_validation", "n_validaton"),
    "teacher": ("expected_accuracy", "expected_acuracy"),
    "teacher.model": ("options", "option"),
    "teacher.training": ("batch_size", "batchsize"),
    "teacher.training.augment": ("crop_padding", "crop_pading"),
    "teachers.small": ("learns_from", "learn_from"),
    "dynamics": ("window", "windw"),
    "recordings": ("folds", "foldes"),
    "recordings.models.tiny": ("options", "optoins"),
    "selections.mixed": ("balanced", "balancd"),
    "students.tiny": ("model", "modle"),
    "training": ("warmup_steps", "warmup_step"),
    "objectives.kd": ("temperature", "temprature"),
    "axes": ("strategy", "stratgy"),
    "probe": ("c_grid", "cgrid"),
    "compare": ("confidence_level", "confidence_levels"),
    "compute": ("channels_last", "chanels_last"),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_typo_in_a_key_gives_its_section_and_the_nearest_key(write, section):
    known, typo = SECTIONS[section]
    content = changed(f"{section}.{typo}".lstrip("."), 1)
    where = section.replace(".", r"\.") or "study"
    with pytest.raises(StudyError, match=f"{where}: unknown key '{typo}'; did you mean '{known}'"):
        load_study(write(content))


def test_every_section_of_a_study_is_in_the_table_of_typos():
    def sections(content: dict, path: str = "") -> set[str]:
        named = {"students", "objectives", "teacher.model.options", "students.wide.model.options"}
        named |= {"selections", "selections.mixed.shares", "recordings.models", "teachers"}
        found = set() if path in named else {path}
        for key, value in content.items():
            if isinstance(value, dict):
                found |= sections(value, f"{path}.{key}".lstrip("."))
        return found

    siblings = {"students.wide", "students.tiny.model", "students.wide.model"}
    siblings |= {"objectives.plain", "objectives.smooth"}
    siblings |= {"teachers.small.model", "teachers.small.training"}
    assert sections(STUDY) - siblings == set(SECTIONS)


@pytest.mark.parametrize("key", [7, 2.5, True, None])
@pytest.mark.parametrize("section", ["", "data", "students", "teacher.model.options"])
def test_a_key_that_is_no_word_is_refused(write, section, key):
    content = copy.deepcopy(STUDY)
    inside = content
    for part in section.split(".") if section else []:
        inside = inside[part]
    inside[key] = 1
    with pytest.raises(StudyError, match="is not a valid study"):
        load_study(write(content))


NAMES = {  # a value that is a name: where, a typo, and the message
    "data.source": ("cifar11", r"data\.source: unknown value 'cifar11'; did you mean 'cifar10'"),
    "teacher.model.name": ("tiny_cn", r"model\.name: unknown model 'tiny_cn'; did you mean 'tiny_"),
    "axes.strategy": (["esy"], r"study: unknown strategy 'esy'; did you mean 'easy'"),
    "axes.student": (["tny"], r"study: unknown student on the axis 'tny'; did you mean 'tiny'"),
    "axes.objective": (["kdd"], r"study: unknown objective 'kdd'; did you mean 'kd'"),
    "probe.objective": (
        ["plan"],
        r"study: unknown objective to probe 'plan'; did you mean 'plain'",
    ),
    "probe.strategy": (["hard"], r"unknown strategy to probe 'hard'; known: easy, full, random"),
    "compare.baseline": ("randm", r"unknown baseline strategy 'randm'; did you mean 'random'"),
    "compare.objective": ("kdd", r"unknown objective to compare with 'kdd'; did you mean 'kd'"),
}


@pytest.mark.parametrize("path", NAMES)
def test_a_typo_in_a_name_gives_the_nearest_name(write, path):
    typo, message = NAMES[path]
    with pytest.raises(StudyError, match=message):
        load_study(write(changed(path, typo)))


IMPOSSIBLE = [
    ("training.epochs", 2, "give the budget once"),
    ("training.steps", 0, "training.steps: Input should be greater"),
    ("training.schedule", "one_cycle", "rises before it falls; give `warmup_steps`"),
    ("training.milestones", [0.5], "`milestones` belong to `schedule: step`"),
    ("training.accumulate", 7, "is not a multiple of accumulate 7"),
    ("training.ema", 1.0, r"ema: Input should be less than 1"),
    ("training.early_stopping", 0, "early_stopping: Input should be greater"),
    ("teacher.training.early_stopping", 3, "`early_stopping` is for students"),
    ("teacher.trained_on", "train", "teacher: unknown key 'trained_on'"),
    ("teacher.pretrained", True, "teacher: tiny_cnn has no published weights; give `weights`"),
    ("students.tiny.pretrained", True, "tiny: tiny_cnn has no published weights; give `weights`"),
    (
        "students.tiny",
        {"model": {"name": "timm/resnet10t"}, "pretrained": True, "weights": "w.pt"},
        "begins from `pretrained` or from `weights`: give one",
    ),
    ("students.tiny.freeze", "backbone", "network that was drawn at random; give `pretrained"),
    (
        "students.tiny.freeze",
        "head",
        r"tiny\.freeze: Input should be 'backbone'|unknown value 'head'",
    ),
    (
        "students.tiny.model.name",
        "timm/resnet18.a1_in1k",
        r"the tag out \(timm/resnet18\), or",
    ),
    ("recordings.models.tiny.name", "timm/resnet18.a1", r"the tag out \(timm/resnet18\), or"),
    ("teacher.model.name", "hub/a/b:c/d", "downloaded code, which would run here"),
    ("students.tiny.model.name", "hub/owner/repo/entry", "is no torch.hub network; expected hub/"),
    ("objectives.plain.kind", "tokens", r"objectives\.plain\.patch_weight: Field required"),
    ("compute.processes", 0, "processes: Input should be greater"),
    ("compute.precision", "fp32", "precision: unknown value 'fp32'; known: auto, bf16"),
    ("training.lr_peak", 0, "lr_peak: Input should be greater than 0"),
    ("training.momentum", 1, "momentum: Input should be less than 1"),
    ("training.optimiser", "adamax", "optimiser: unknown value 'adamax'; did you mean 'adam'"),
    ("training.betas", [0.9, 0.99], "`betas` are of adam and adamw; sgd has `momentum`"),
    ("training.lr_floor", 0.05, r"lr_floor is 0\.05; expected less than lr_peak, 0\.05"),
    (
        "teacher.training",
        {"steps": 1, "batch_size": 1, "lr_peak": 1, "schedule": "constant", "lr_floor": 0.1},
        "`lr_floor` is of the schedules cosine, one_cycle",
    ),
    ("training.checkpoint_fractions", [0, 1.5], r"checkpoint_fractions\.1: Input should be less"),
    ("data.folder", "images", "give it with `source: folder` or `source: tensors`, and only"),
    ("data.source", "folder", "give it with `source: folder` or `source: tensors`, and only"),
    ("data.n_validation", -1, "n_validation: Input should be greater"),
    ("data.split_seed", -1, "split_seed: Input should be greater"),
    ("teacher.training", None, "either trained .*, or `training` with one of the other two"),
    ("teacher.mean", [0.5], "teacher: unknown key 'mean'; known: expected_accuracy"),
    ("teacher.expected_accuracy", 90, "expected_accuracy: Input should be less .*; got 90"),
    ("compare.objective", "", "unknown objective to compare with ''; known: "),
    ("compute.threads", True, "compute.threads: Input should be a valid integer; got True"),
    ("dynamics.model", {"name": "tiny_cnn"}, "`model` and `training` of dynamics go together"),
    ("dynamics.window", 1, "window: Input should be greater"),
    ("objectives.kd.alpha", 1.5, r"kd\.alpha: Input should be less"),
    ("objectives.kd.temperature", 0, r"kd\.temperature: Input should be greater"),
    ("objectives.plain.alpha", 0.5, "objectives.plain: unknown key 'alpha'; known: kind"),
    ("objectives.smooth.smoothing", None, "objectives.smooth.smoothing: Field required"),
    ("axes.fraction", [0.1, 0.0], r"axes\.fraction\.1: Input should be greater than 0"),
    ("axes.strategy", ["easy", "random", "easy"], r"axes\.strategy: .* names a value twice"),
    ("probe.fraction", 0.5, "probe.fraction is 0.5; expected one of axes.fraction"),
    ("axes.student", ["tiny", "tiny"], r"axes\.student: .* names a value twice"),
    ("students", {}, "students: Dictionary should have at least 1"),
    ("compare.margin", float("nan"), "margin: Input should be"),
    ("compare.measure", "lin", "measure: unknown value 'lin'; did you mean 'linear'"),
    ("probe.k", 0, "k: Input should be greater"),
    ("probe.k", [5, 0], r"probe\.k\.1: Input should be greater than or equal to 1"),
    ("probe.k", [5, 5], r"probe\.k: \[5, 5\] names a value twice"),
    ("probe.fraction", [0.1, 0.5], "probe.fraction is 0.5; expected one of axes.fraction"),
    ("compare.on", ["own"], "compare.on names data sets on which probes are compared: give mea"),
    ("axes.shards", [3], "`shards` are for the strategies fixed_shards and random_shards"),
    ("axes.fraction", None, "`fraction` is missing: random takes a fraction of the images"),
    ("compare", {"measure": "knn", "on": ["mnist"]}, "unknown data set to compare on 'mnist'"),
    # YAML reads `yes` as true and `no` as false: neither is a number
    ("training.batch_size", True, "batch_size: Input should be a valid integer"),
    ("teacher.seed", False, "seed: Input should be a valid integer"),
    ("seeds", [0, 1.5], "seeds.1: Input should be a valid integer"),
    ("objectives.a/b", {"kind": "cross_entropy"}, "'a/b' is not allowed here; expected letters"),
    ("students.wide ", {"model": {"name": "tiny_cnn"}}, "'wide ' is not allowed"),
    ("seeds", [0], "seeds: Tuple should have at least 2"),
    ("seeds", [0, -1], r"seeds\.1: Input should be greater"),
    ("seeds", [1, 1], r"seeds: \[1, 1\] names a value twice"),
    ("dynamics.window", 2, "needs a `window` of at least 3"),
    ("students.wide.model", {"name": "hub/a/b:main/c"}, "comes with its code and is for teachers"),
    ("probe.c_grid", [], "probe.c_grid: Tuple should have at least 1 item"),
    ("probe.c_grid", [-1.0], r"probe\.c_grid\.0: Input should be greater than 0"),
    ("probe.strategy", [], "at least 1 item"),
    ("probe.layers", ["stage1"], "expected features, and stage1"),
    ("probe.layers", ["features", "stage0"], "expected features, stage1"),
    ("probe.layers", ["features", "features"], "names a value twice"),
    ("probe.few_shot", [0], r"few_shot\.0: Input should be greater than or equal to 1"),
    ("probe.few_shot", [5, 5], "names a value twice"),
    ("probe.few_shot_draws", 0, "greater than or equal to 1"),
    ("probe.others", {"own": {"source": "digits", "n_validation": 9}}, "`own` is the study's data"),
    ("probe.others", {"a/b": {"source": "digits", "n_validation": 9}}, "'a/b' is not allowed here"),
    ("probe.others", {"more": {"source": "digts", "n_validation": 9}}, "did you mean 'digits'"),
    ("selections.mixed", {"kind": "esy"}, "mixed: unknown kind 'esy'; did you mean 'easy'"),
    ("selections.mixed", {"kind": "easy", "cutoff": 0.1}, "unknown key 'cutoff'; known: balanced"),
    ("selections.mixed", {"kind": "ccs", "shares": {}}, "unknown key 'shares'; known: balanced, c"),
    ("selections.mixed", {"kind": "ccs", "score": "trend"}, "mixed.score: unknown value 'trend'"),
    ("selections.mixed", {"kind": "mixture"}, r"mixed\.shares: Field required"),
    ("selections.mixed.shares", {"easy": 0.5, "hard": 0.4}, "sum to 1"),
    ("selections.mixed.shares", {"easy": 1.5, "hard": -0.5}, "hard: Input should be gr"),
    ("selections.mixed.shares", {"ccs": 1.0}, r"shares\.ccs: unknown value 'ccs'"),
    ("selections.easy", {"kind": "random"}, "has the name of a built-in strategy"),
    ("selections.picked_mine", {"kind": "random"}, "has the name of a built-in strategy"),
    ("data.relabel", {"noise": 0.1, "file": "a.npz", "key": "b"}, "drawn .* or read"),
    ("data.relabel", {}, "drawn .* or read"),
    ("data.relabel", {"file": "a.npz"}, "drawn .* or read"),
    ("data.relabel", {"noise": 0.0}, "greater than 0"),
    ("data.part", "6/5", "part is '6/5'; expected i/k with 1 <= i <= k"),
]


@pytest.mark.parametrize(("path", "value", "message"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_with_its_place(write, path, value, message):
    with pytest.raises(StudyError, match=message):
        load_study(write(changed(path, value)))


def test_seed_0_is_a_seed_not_an_absent_one(write):
    assert load_study(write(changed("seeds", [0, 3]))).seeds == (0, 3)


def test_the_name_of_a_study_cannot_be_written_into_it(write):
    with pytest.raises(StudyError, match=r"`name` is taken from the file name \(case\)"):
        load_study(write({"name": "other", **STUDY}))


def test_a_long_list_of_faults_is_cut(write):
    content = changed("seeds", ["no integer"] * 500)
    with pytest.raises(StudyError, match=r"(?s)seeds\.0: .*and \d+ more") as caught:
        load_study(write(content))
    assert str(caught.value).count("\n") == 21


def test_a_file_is_laid_over_its_base(home, write):
    write(STUDY)
    more = {"base": "case.yaml", "training": {"steps": None, "epochs": 2.0}, "seeds": [5, 6, 7]}
    (home / "params/more.yaml").write_text(yaml.safe_dump(more))
    found = load_study("params/more.yaml")
    assert (found.name, found.seeds, found.training.epochs) == ("more", (5, 6, 7), 2.0)
    assert found.training.steps is None
    assert found.teacher == load_study("params/case.yaml").teacher


def test_a_base_that_is_null_is_not_given(write):
    assert load_study(write({**STUDY, "base": None})).seeds == (0, 1)


@pytest.mark.parametrize(
    ("base", "message"), [("more.yaml", "itself"), ("none.yaml", "no file"), ("''", "no file")]
)
def test_a_base_that_is_no_other_study_is_refused(home, base, message):
    (home / "params").mkdir()
    (home / "params/more.yaml").write_text(f"base: {base}\n")
    with pytest.raises(StudyError, match=message):
        load_study("params/more.yaml")


@pytest.mark.parametrize("value", [1, None])
def test_a_misspelt_key_is_refused_whatever_its_value(write, value):
    with pytest.raises(StudyError, match="unknown key 'recordngs'; did you mean 'recordings'"):
        load_study(write(changed("recordngs", value)))


def test_a_tag_that_does_not_fit_its_value_is_refused(home):
    path = home / "odd.yaml"
    path.write_text("audit: !!bool maybe\n")
    with pytest.raises(StudyError, match="not a readable YAML file: 'maybe'; expected"):
        load_study(path)


@pytest.mark.parametrize("how", [{"early_stopping": 2}, {"schedule": "plateau"}])
def test_nothing_reads_validation_images_where_none_are_held_out(how):
    content = changed("data.n_validation", 0)
    assert validated(content).data.n_validation == 0
    content["training"] |= how
    with pytest.raises(StudyError, match=r"reads validation images, and data\.n_validation is 0"):
        validated(content)
