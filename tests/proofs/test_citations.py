"""The pages of docs/derivations and the proofs cite each other, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import claims as site
import pytest

HERE = Path(__file__).parent
PAGES = sorted((HERE.parents[1] / "docs" / "derivations").glob("*.md"))
PROOFS = {
    f"{path.name}::{name}"
    for path in HERE.glob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if path != Path(__file__)
}
CITATION = re.compile(r"`(test_\w+\.py::test_\w+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_citations_exist(page):
    text = page.read_text(encoding="utf-8")
    assert set(CITATION.findall(text)) <= PROOFS
    assert all((page.parent / target).exists() for target in re.findall(r"\]\(([^):#]+)\)", text))
    assert all(1 <= int(number) <= 27 for number in re.findall(r"\bP(\d+)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_claim_is_checked(page):
    claims = re.split(r"(?=\*\*[A-Z]\d+\.\*\*)", page.read_text(encoding="utf-8"))[1:]
    assert claims
    assert [claim[:9] for claim in claims if not CITATION.search(claim)] == []


def test_every_proof_is_cited():
    cited = {name for page in PAGES for name in CITATION.findall(page.read_text(encoding="utf-8"))}
    assert PROOFS - cited == set()


def test_every_claim_has_a_proof_by_a_named_prover_and_an_implementation():
    found = [claim for page in site.pages() for claim in site.claims(page)]
    assert len({(claim.page, claim.label) for claim in found}) == len(found) > 80
    assert {claim.page for claim in found} == {page.stem for page in PAGES}
    assert set(site.proofs()) == PROOFS
    for claim in found:
        assert claim.implemented_by, claim
        provers = {site.proofs()[name].prover for name in claim.proofs}
        assert provers, claim
        assert all(re.match(r"SymPy|z3|iv|enumeration|NumPy|mpmath", prover) for prover in provers), (claim.label, provers)
