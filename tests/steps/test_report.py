"""The report is one file that loads nothing, escapes what it shows, and links every number."""

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import TINY, first_run, forge, tiny_study

from kdlib.__main__ import main
from kdlib.compare.comparisons import comparisons
from kdlib.steps import report
from kdlib.steps.captions import CAPTIONS
from kdlib.steps.compare import compile_tables
from kdlib.steps.display import FIGURES
from kdlib.study.load import load_study


class Page(HTMLParser):
    """What a page holds: ids, links, texts, and what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.hrefs, self.loads, self.tags, self.texts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.hrefs += [attrs["href"]] if tag == "a" else []
        self.loads += [attrs[name] for name in ("src", "srcset", "data") if name in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(study, tables, file=TINY, **options):
    return report.report_html(study, file, tables, "its runs", {}, **options)


@pytest.fixture
def compiled(lab):
    study = tiny_study(lab)
    return study, compile_tables(study)


def test_every_number_leads_to_an_evidence_row_that_is_there(compiled):
    study, tables = compiled
    html = page_of(study, tables)
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    anchors = [href.removeprefix("#") for href in page.hrefs if href.startswith("#")]
    assert set(anchors) <= set(page.ids)
    assert len([id for id in page.ids if id.startswith("cell-")]) == 6
    assert len([id for id in page.ids if id.startswith("run-")]) == 12
    for row in tables["strategies"].itertuples():
        place = re.search(rf'<tr id="strategies-{row.Index}">.*?</tr>', html, re.DOTALL)[0]
        mean, against = f"{100 * row.mean:.1f}", f"{100 * row.against_mean:.1f}"
        cells = dict(re.findall(r'<a href="#(cell-\d+)">([\d.]+) ±', place))
        assert sorted(cells.values()) == sorted([mean, against])
        for anchor, number in cells.items():
            cell = re.search(rf'<tbody id="{anchor}">.*?</tbody>', html, re.DOTALL)[0]
            accuracies = [float(n) for n in re.findall(r">([\d.]+) %<", cell)]
            assert sum(accuracies) / 2 == pytest.approx(float(number), abs=0.06)
            assert "papermill notebooks/04_distill.ipynb" in cell
    shown, results = set(re.findall(r'title="(\w+)"', html)), tables["results"]
    made = tables["made"]  # what differs from machine to machine
    assert set(results["subset_sha256"]) | set(results["weights_sha256"]) <= shown
    assert set(made["git_commit"]) | set(made["code_sha256"]) <= shown


def test_the_page_says_question_answer_and_cover_first(compiled):
    study, tables = compiled
    text = Page(page_of(study, tables)).text
    parts = ["made from its runs", "Does everything work?", "Undecided: where tiny learns from",
             "This holds for digits, 1,100 training images", "Figures", "Tables",
             "Classes of each subset", "Evidence", "Refused runs", "How to run any cell again",
             "Checks"]  # fmt: skip
    places = [text.index(part) for part in parts[:4]]
    assert places == sorted(places)
    heads = re.findall(r"<h2>(.*?)</h2>", page_of(study, tables))
    assert heads == parts[4:]
    assert "None: all 12 runs passed every check." in text


def test_rows_are_sorted_by_difference_and_folds_open_for_a_print(compiled):
    study, tables = compiled
    html = page_of(study, tables)
    shown = [int(n) for n in re.findall(r'<tr id="strategies-(\d+)">', html)]
    differences = tables["strategies"].loc[shown, "difference"].tolist()
    assert differences == sorted(differences, reverse=True)
    assert "<details" in html
    assert "open><summary>" not in html
    printed = page_of(study, tables, unfolded=True)
    assert printed.count("open><summary>") == html.count("<summary>")


def test_what_the_data_say_is_text_and_nothing_else(compiled):
    study, tables = compiled
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    results = tables["results"].assign(
        command=evil, duplicates=evil, device=evil, class_names=f'["{evil[:20]}"]'
    )
    results["class_counts"] = "9"
    results.loc[0, ["refused", "reason"]] = True, evil
    tables = comparisons(study, tables | {"results": results})
    file = study.figures.parents[1] / "params" / "tiny.yaml"
    file.write_text(f"# {evil}?\n{file.read_text()}")
    page = Page(page_of(study, tables, file=file))
    assert {"script", "img", "iframe", "link", "object"}.isdisjoint(page.tags)
    assert page.loads == []
    assert page.text.count(evil) > 6


def test_refused_rows_stand_with_their_reasons_and_fail_their_check(lab):
    study = tiny_study(lab)
    forge(first_run(study), lambda e: e["budget"]["recorded"].update(steps=156))
    html = page_of(study, compile_tables(study))
    page = Page(html)
    assert "#run-0" in page.hrefs
    assert "steps: 60 -> 156" in page.text
    assert '<tr id="run-0" class="refused">' in html
    assert re.search(r">budget</td>.*?>11</td>\s*<td class=\"r\">1</td>", html, re.DOTALL)


def test_a_report_is_made_of_committed_tables_alone_with_its_figures(compiled, monkeypatch, capsys):
    study, _ = compiled
    shutil.rmtree(study.runs)
    shutil.rmtree(study.cache)
    (study.figures / "datamap.html").write_text("the map")
    monkeypatch.setattr("sys.argv", ["kdlib", "report", "params/tiny.yaml", "--html"])
    assert main() == 0
    said, written = capsys.readouterr().out.splitlines()
    assert said == "tiny: the report is made from its committed tables"
    html = Path(written).read_text()
    page = Page(html)
    assert "made from its committed tables" in page.text
    assert "datamap.html" in page.hrefs
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    accuracy = base64.b64encode((study.figures / "accuracy.png").read_bytes()).decode()
    assert accuracy in html
    assert "default-src 'none'" in html
    assert main() == 0
    assert Path(written).read_text() == html  # the same bytes again


def test_tables_from_before_classes_and_checks_were_recorded_make_a_report_that_says_so(compiled):
    study, tables = compiled
    older = ["class_counts", "class_names", "failed_checks"]
    results = tables["results"].drop(columns=older)
    tables = {name: tables[name] for name in ("results", "curves", "probes")}  # no runs are here
    text = Page(page_of(study, comparisons(study, tables | {"results": results}))).text
    assert "The commit of each run stands in its evidence, where the runs are." in text
    assert "compiled before the classes of subsets were recorded" in text
    assert "compiled before the names of failed checks were recorded" in text


def test_without_a_browser_there_is_a_page_and_a_sentence(compiled, monkeypatch, capsys):
    study, _ = compiled
    monkeypatch.setattr(report, "APPLICATIONS", ())
    monkeypatch.setenv("PATH", str(study.runs))
    monkeypatch.setattr("kdlib.steps.figures.draw_comparison", lambda study, tables: {})
    monkeypatch.setattr("sys.argv", ["kdlib", "report", "params/tiny.yaml"])
    assert main() == 0
    printed = capsys.readouterr()
    assert "report.html" in printed.out
    assert printed.err.count("no PDF was made: it is printed by Chromium, Chrome or Edge") == 1


def test_a_browser_that_prints_nothing_is_said(tmp_path):
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    browser.chmod(0o755)
    with pytest.raises(RuntimeError, match="printed none \\(no display\\)"):
        report.print_page(str(browser), "<p>", tmp_path / "report.pdf")


def test_a_browser_prints_the_page(tmp_path):
    try:
        browser = report.find_browser()
    except RuntimeError as error:
        pytest.skip(str(error))
    path = report.print_page(browser, "<h1>A report</h1>", tmp_path / "report.pdf")
    assert path.read_bytes().startswith(b"%PDF-")


def test_every_figure_has_a_caption():
    names = {name for names in FIGURES.values() for name in names}
    assert names <= set(CAPTIONS)
    assert all(text.endswith(".") for text in CAPTIONS.values())


def test_a_study_without_tables_is_refused(home):
    (home / "params").mkdir()
    shutil.copy(TINY, home / "params")
    study = load_study("params/tiny.yaml")
    with pytest.raises(FileNotFoundError, match="neither runs"):
        report.write_report(study, TINY)
