"""Models by name, and what a stream keeps while they change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from semid_server.errors import FingerprintMismatchError, ModelNotFoundError, NotServingError
from semid_server.serving.catalogue import Catalogue, PinnedCatalogue


@pytest.fixture
def models(toy_served):
    return {name: replace(toy_served, name=name) for name in "abc"}


@pytest.fixture
def catalogue(models):
    made = Catalogue()
    for name in "bac":
        made.put(models[name])
    return made


def test_a_model_is_found_by_its_name_and_the_first_by_none(catalogue, models):
    assert catalogue.find("a") is models["a"]
    assert catalogue.find("") is models["b"]
    assert [model.name for model in catalogue.models] == ["a", "b", "c"]
    assert catalogue.names == ["b", "a", "c"]


def test_an_unknown_name_is_told_all_that_there_are(catalogue):
    with pytest.raises(ModelNotFoundError, match=r"no model named 'x'.*served: 'a', 'b', 'c'"):
        catalogue.find("x")


def test_while_nothing_is_loaded_nothing_is_served():
    with pytest.raises(NotServingError):
        Catalogue().find("")


def test_an_expected_fingerprint_must_be_the_models(catalogue, models):
    assert catalogue.expect("a", "") is models["a"]
    assert catalogue.expect("a", "f" * 64) is models["a"]
    with pytest.raises(FingerprintMismatchError):
        catalogue.expect("a", "0" * 64)


def test_a_new_version_takes_the_place_of_the_old_one(catalogue, models):
    newer = replace(models["b"], fingerprint="e" * 64)
    catalogue.put(newer)
    assert catalogue.find("b") is newer
    assert catalogue.find("") is newer
    assert catalogue.names == ["b", "a", "c"]


def test_a_pinned_view_keeps_the_version_that_it_found_first(catalogue, models):
    pinned = PinnedCatalogue(catalogue)
    assert pinned.find("a") is models["a"]
    newer = {name: replace(models[name], fingerprint="e" * 64) for name in "abc"}
    for model in newer.values():
        catalogue.put(model)
    assert pinned.find("a") is models["a"]
    assert pinned.find("c") is newer["c"]
    with pytest.raises(FingerprintMismatchError):
        pinned.expect("a", "e" * 64)


def test_a_pinned_view_has_one_version_of_the_default_model_whichever_way_it_is_asked_for(
    catalogue, models
):
    by_none_first, by_name_first = PinnedCatalogue(catalogue), PinnedCatalogue(catalogue)
    by_none_first.find("")
    by_name_first.find("b")
    catalogue.put(replace(models["b"], fingerprint="e" * 64))
    for pinned in (by_none_first, by_name_first):
        for name in ("b", "", "b"):
            assert pinned.find(name) is models["b"]


def test_versions_of_one_model_never_share_a_batch(models):
    assert replace(models["a"]) != models["a"]
