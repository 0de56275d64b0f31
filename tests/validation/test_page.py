from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from infoprune_export.validation.page import pictures, report_page
from infoprune_export.validation.records import NotMeasured

VOID = {"meta", "br", "hr", "img", "link"}


class Checked(HTMLParser):
    """Holds the tags in balance and gathers what a reader sees."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def page(report, plan) -> str:
    return report_page(report, plan)


def test_it_says_whether_the_network_was_trained(report, plan):
    text = " ".join(Checked(report_page(report, plan)).text.split())
    assert f"Then the smaller network was trained: {report.training}." in text
    report.training = None
    assert "It was not trained after that." in Checked(report_page(report, plan)).text


def test_tags_balance_and_the_figures_are_there(page):
    checked = Checked(page)
    assert not checked.open
    text = " ".join(checked.text.split())
    for figure in (
        "tiny-llava at 0.",
        "0.950",
        "0.925",
        "\N{MINUS SIGN}2.5 points",
        "20.0 ms",
        "14.0 ms",
        "1.43x",
        "vision_encoder",
        "128",
        "no NVIDIA GPU here",
    ):
        assert figure in text


def test_the_page_needs_nothing_beside_itself(page):
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<img|<iframe|javascript:", page)
    for _, attributes in Checked(page).tags:
        assert not {"src", "srcset", "data", "action"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "</style><b>"])
def test_user_strings_are_escaped(report, plan, hostile):
    report.name = report.source.id = hostile
    report.accuracy = {hostile: report.accuracy["vqa"].model_copy(update={"metric": hostile})}
    report.latency = {hostile: {hostile: report.latency["ort"]["vision"], "end_to_end": report.latency["ort"]["end_to_end"]}}
    report.machine = {hostile: [hostile]}
    report.not_measured = [NotMeasured(what=hostile, reason=hostile)]
    report.numerics["vision_encoder"].message = hostile
    report.gates[hostile] = report.gates["numerics"].model_copy(update={"measured": hostile})
    checked = Checked(report_page(report, plan))
    assert {tag for tag, _ in checked.tags}.isdisjoint({"script", "img", "b"})
    assert not any(name.startswith("on") for _, attributes in checked.tags for name in attributes)
    assert checked.text.count(hostile) >= 8


def test_pictures_show_what_the_plan_keeps(plan):
    vision, language = pictures(plan)
    assert not vision.grouped and language.grouped
    assert vision.heads[0].groups == ((True,), (False,), (True,))
    assert language.heads[2].groups == ((False, False), (True, True))
    assert (language.heads_kept, language.heads[0].groups_kept) == ((6, 12), 1)
    up, down = vision.ranks[0].cells
    assert (up.rank, up.full, up.fraction) == (5, 12, 5 / 12) and (down.rank, down.fraction) == (None, 1.0)
    assert up.break_even == pytest.approx((12 * 24 / (12 + 24)) / 12)


def test_one_cell_per_head_and_one_bar_per_matrix(page):
    tags = Checked(page).tags
    cells = [a["class"] for tag, a in tags if tag == "rect" and a.get("class") in ("kept", "removed") and a["y"] == "0.5"]
    assert (cells.count("kept"), cells.count("removed")) == (2 * 2 + 3 * 2, 2 * 1 + 3 * 2)
    labels = [a.get("aria-label", "") for tag, a in tags if tag == "svg"]
    assert "layer 1 down: dense" in labels and "layer 2 gate: rank 6 of 16" in labels


def test_a_report_with_nothing_measured_still_makes_a_page(report):
    report.accuracy, report.latency, report.numerics, report.machine = {}, {}, {}, {}
    report.size.original_bytes = None
    report.not_measured = []
    text = Checked(report_page(report)).text
    assert "original not at hand" in text and "Heads kept" not in text


def test_without_an_original_its_figures_are_absent(report, plan):
    accuracy = report.accuracy["vqa"]
    accuracy.original = accuracy.original_interval = accuracy.drop_points = accuracy.drop_points_interval = None
    for part in report.latency["ort"].values():
        part.original = part.speedup = None
    text = Checked(report_page(report, plan)).text
    assert "original not measured" in text and "0.925" in text and "nan" not in text.lower()
