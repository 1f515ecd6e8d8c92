"""Bearer tokens: who may call what, and what a bad file gets."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from semid_server.errors import ConfigurationError, PermissionDeniedError, UnauthenticatedError
from semid_server.serving.tokens import TokenFile

METHODS = frozenset({"Encode", "Decode", "GetModel"})


def hashed(token):
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(
        f"# all methods\n{hashed('all')}\n\n{hashed('some')}  Encode,GetModel # a comment\n"
    )
    return path


@pytest.fixture
def tokens(file):
    return TokenFile(file, METHODS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_token_without_methods_is_good_for_all(tokens, method):
    tokens.check("Bearer all", method)
    tokens.check("bearer all", method)


def test_a_token_with_methods_is_good_for_those_alone(tokens):
    tokens.check("Bearer some", "Encode")
    tokens.check("Bearer some", "GetModel")
    with pytest.raises(PermissionDeniedError, match="not good for Decode"):
        tokens.check("Bearer some", "Decode")


@pytest.mark.parametrize("authorization", [None, "", "all", "Basic all", "Bearer", "Bearer "])
def test_a_call_without_a_token_is_told_how_to_send_one(tokens, authorization):
    with pytest.raises(UnauthenticatedError, match="authorization: Bearer TOKEN"):
        tokens.check(authorization, "Encode")


@pytest.mark.parametrize("token", ["other", "all ", "ALL", hashed("all"), "\udcff"])
def test_an_unknown_token_is_refused_and_not_repeated(tokens, token):
    with pytest.raises(UnauthenticatedError) as caught:
        tokens.check(f"Bearer {token}", "Encode")
    assert token.strip() not in str(caught.value)


def test_a_changed_file_counts_once_it_was_looked_at(tokens, file):
    file.write_text(hashed("new") + "\n")
    tokens.check("Bearer all", "Encode")
    tokens.look()
    tokens.check("Bearer new", "Encode")
    with pytest.raises(UnauthenticatedError):
        tokens.check("Bearer all", "Encode")


def test_a_file_that_changes_within_a_tick_of_the_clock_is_seen_to_change(tokens, file):
    for token in ("new", "old"):
        file.write_text(hashed(token) + "\n")
        os.utime(file, ns=(0, 0))
        tokens.look()
    tokens.check("Bearer old", "Encode")
    with pytest.raises(UnauthenticatedError):
        tokens.check("Bearer new", "Encode")


def replace_by(file, content):
    """Put something in the place of the file: None for nothing, a function for what it makes."""
    file.unlink()
    if callable(content):
        content(file)
    elif content is not None:
        file.write_text(content)


WHOLE = f"{hashed('all')}\n{hashed('some')} GetModel,Encode\n"


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_a_file_that_was_cut_anywhere_opens_no_door(tokens, file, length):
    file.write_text(WHOLE[:length])
    tokens.look()
    with pytest.raises((PermissionDeniedError, UnauthenticatedError)):
        tokens.check("Bearer some", "Decode")
    file.write_text(WHOLE)
    tokens.look()
    tokens.check("Bearer some", "Encode")


@pytest.mark.parametrize("length", [len(WHOLE) - 1, len(WHOLE) - len(" GetModel,Encode\n")])
def test_a_file_that_was_cut_before_its_last_newline_is_refused_at_the_start(file, length):
    file.write_text(WHOLE[:length])
    with pytest.raises(ConfigurationError, match="line 2: the file ends without a newline"):
        TokenFile(file, METHODS)


UNUSABLE = ["", "nonsense\n", None, os.mkdir, os.mkfifo]


@pytest.mark.parametrize("content", UNUSABLE)
def test_a_file_that_becomes_unusable_leaves_the_tokens_as_they_were(tokens, file, content, caplog):
    replace_by(file, content)
    tokens.look()
    tokens.check("Bearer all", "Encode")
    with pytest.raises(UnauthenticatedError):
        tokens.check("Bearer nonsense", "Encode")
    assert "the tokens read before stay good" in caplog.text


def said(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("content", UNUSABLE)
def test_an_unusable_file_is_told_of_once_and_not_at_each_look(tokens, file, content, caplog):
    replace_by(file, content)
    for _ in range(3):
        tokens.look()
    assert len(said(caplog)) == 1


def test_a_file_that_comes_back_is_read_as_it_was_before(tokens, file):
    aside = file.rename(file.with_name("aside"))
    tokens.look()
    aside.write_text(hashed("new") + "\n")
    aside.rename(file)
    tokens.look()
    tokens.check("Bearer new", "Encode")


class Unreadable(type(Path())):
    """A file that may be read once its permissions are mended, which its times do not show."""

    mended = True

    def stat(self, **settings):
        return Path(super().__fspath__()).stat(**settings)

    def __fspath__(self):
        if not self.mended:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return super().__fspath__()


def test_a_file_that_may_be_read_again_is_read_though_nothing_else_of_it_has_changed(file, caplog):
    path = Unreadable(file)
    tokens = TokenFile(path, METHODS)
    file.write_text(hashed("new") + "\n")
    path.mended = False
    tokens.look()
    tokens.check("Bearer all", "Encode")
    assert "tokens: Permission denied; the tokens read before stay good" in caplog.text
    path.mended = True
    tokens.look()
    tokens.check("Bearer new", "Encode")
    with pytest.raises(UnauthenticatedError):
        tokens.check("Bearer all", "Encode")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "holds no token"),
        ("# only comments\n", "holds no token"),
        ("secret\n", "line 1: expected the SHA-256"),
        (f"\n{'a' * 63}\n", "line 2: expected the SHA-256"),
        (f"{'A' * 64}\n", "line 1: expected the SHA-256"),
        (f"{'a' * 64} Encode,Delete\n", "line 1: no method is called Delete; there are Decode"),
        (f"{'a' * 64} Encode\n{'a' * 64}\n", "line 2: a token that a line before has already"),
        ("secret", "line 1: the file ends without a newline"),
        (b"\xff\xfe", "is not text in UTF-8"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_without_its_content(tmp_path, content, text):
    path = tmp_path / "tokens"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError, match=text) as caught:
        TokenFile(path, METHODS)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("make", "kind"), [(os.mkdir, "folder"), (os.mkfifo, "pipe")])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make, kind):
    make(tmp_path / "tokens")
    with pytest.raises(ConfigurationError, match=f"tokens: not a regular file but a {kind}"):
        TokenFile(tmp_path / "tokens", METHODS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="nowhere: No such file"):
        TokenFile(tmp_path / "nowhere", METHODS)
