"""The writer of the scorecard: cells, judgements, stale remarks."""

from pathlib import Path

import pytest
from write import FAIL, JUDGED, NOT_APPLICABLE, PASS, Remark, case, page, read_remarks, readable, refuse_unused, verdict


def check(number, status, reason="", name="check"):
    return {
        "check": name,
        "property": number,
        "statement": f"{number} holds.",
        "status": status,
        "reason": reason,
        "counterexample": "",
    }


def row(*results, name="verl vanilla", empty_is_finite=False):
    claims = {
        "objective": "PPOClip(eps=0.2)",
        "form": "ratio",
        "reduction": "token_mean",
        "dtype": "float32",
        "normalizer": True,
        "local": True,
    }
    return {
        "name": name,
        "called": "`f(a | b)`",
        "boundary": "",
        "claims": claims,
        "counts_empty_rows": False,
        "empty_is_finite": empty_is_finite,
        "results": list(results),
    }


def result(*rows):
    return {"framework": "verl", "python": "3.11", "packages": {"verl": "0.9.1"}, "rows": list(rows)}


def test_a_property_fails_if_any_of_its_checks_does():
    mixed = row(check("P3", "passed"), check("P3", "failed"), check("P3", "not applicable"))
    assert verdict(mixed, "P3", []) == FAIL


def test_a_property_passes_if_some_check_applies():
    assert verdict(row(check("P3", "passed"), check("P3", "not applicable")), "P3", []) == PASS
    assert verdict(row(check("P3", "not applicable")), "P3", []) == NOT_APPLICABLE
    assert verdict(row(), "P3", []) == NOT_APPLICABLE


def test_a_judged_failure_is_marked_and_explained():
    remark = Remark(rows="verl *", property="P19", cause="A tie.", judged=True)
    failing = row(check("P19", "failed", "weight is 0.5"))
    assert verdict(failing, "P19", [remark]) == JUDGED
    assert "Not held against it. A tie." in page([result(failing)], [remark])


def test_a_judgement_excuses_what_it_has_seen_and_nothing_else():
    remark = Remark(rows="verl *", property="P19", cause="A tie.", judged=True, seen=r"weight is 0\.5")
    assert verdict(row(check("P19", "failed", "weight is 0.5")), "P19", [remark]) == JUDGED
    assert verdict(row(check("P19", "failed", "weight is 0.7")), "P19", [remark]) == FAIL
    both = row(check("P19", "failed", "weight is 0.5"), check("P19", "failed", "weight is 0.7"))
    assert verdict(both, "P19", [remark]) == FAIL


def test_empty_batches_that_fail_with_nan_alone_are_counted_under_p1():
    assert verdict(row(check("P5", "failed"), empty_is_finite=True), "P5", []) == JUDGED
    assert verdict(row(check("P5", "failed"), empty_is_finite=False), "P5", []) == FAIL


def test_a_remark_without_a_failure_is_refused():
    stale = Remark(rows="verl *", property="P1", cause="Fixed since.")
    with pytest.raises(SystemExit, match="no longer fails P1"):
        refuse_unused([result(row(check("P1", "passed")))], [stale])


def test_a_remark_about_a_framework_that_did_not_run_is_kept():
    refuse_unused([result(row(check("P1", "passed")))], [Remark(rows="trl *", property="P1", cause="Elsewhere.")])


def test_a_judgement_without_a_failure_is_kept():
    tie = Remark(rows="verl *", property="P19", cause="A tie.", judged=True)
    refuse_unused([result(row(check("P19", "passed")))], [tie])


def test_page_names_versions_causes_issues_and_reasons():
    failing = row(check("P1", "failed", "gradient is np.float64(nan)"), check("P7", "not applicable", "takes no mask"))
    remark = Remark(rows="verl *", property="P1", cause="0 · NaN.", issues=("verl-project/verl#2377",))
    text = page([result(failing)], [remark])
    assert "verl 0.9.1" in text
    assert "| verl vanilla | P1 | gradient is nan | 0 · NaN. | [verl #2377]" in text
    assert "- P7: takes no mask (all rows)." in text
    assert "`f(a \\| b)`" in text
    assert "Not run for this page: drpo-core, TRL, torchrl, SkyRL." in text


def test_page_is_a_function_of_the_results():
    failing = result(row(check("P1", "failed", "loss is nan")))
    assert page([failing], []) == page([failing], [])


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("at (0, 0) (log π np.float64(-0.6931471824645996), A np.float64(nan))", "at (0, 0) (log π -0.6931472, A nan)"),
        ("is 1.0, not array(0.)", "is 1.0, not 0."),
        ("within 9.54e-07", "within 9.54e-07"),
    ],
)
def test_numbers_are_readable(reason, expected):
    assert readable(reason) == expected


def test_rows_that_fail_alike_share_a_line():
    rows = [row(check("P1", "failed", "loss is nan"), name=name) for name in ("verl vanilla", "verl cispo")]
    assert "| verl vanilla, verl cispo | P1 | loss is nan |" in page([result(*rows)], [])


def test_a_short_counterexample_is_shown_and_a_long_one_is_not():
    batch = "TokenBatch(log_prob=np.array([[-0.6931471805599453]]), mask=np.array([[True]]))"
    assert case(batch) == ". Case: log_prob=[[-0.6931472]], mask=[[True]]"
    assert case(f"('float32', {batch})") == ". Case: log_prob=[[-0.6931472]], mask=[[True]]"
    assert case(batch, longest=20) == ""
    assert case("") == ""


def test_remarks_are_well_formed():
    remarks = read_remarks(Path(__file__).with_name("remarks.toml"))
    assert all(remark.property.startswith("P") and remark.cause.endswith((".", ")")) for remark in remarks)
    assert all("/" in issue and "#" in issue for remark in remarks for issue in remark.issues)
