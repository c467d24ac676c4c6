"""The log holds ids, never a secret and never people's text: canaries through every way into it."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings

import pytest

from core.observability import logs

TELEGRAM = "123456789:AAF-canary_canary_canary_canary_canary0"
CANARIES = {
    "telegram token": TELEGRAM,
    "telegram url": f"https://api.telegram.org/bot{TELEGRAM}/getMe",
    "slack bot": "xoxb-1234567890-canarycanary",
    "slack app": "xapp-1-A123-canarycanary",
    "slack rotation": "xoxe.xoxb-1-canarycanarycanary",
    "slack hook": "https://hooks.slack.com/services/T0/B0/canarycanary",
    "bearer": "Authorization: Bearer canary.canary.canary",
    "hub": "hf_canarycanarycanarycanary",
    "signature": "v0=" + "c0ffee00" * 8,
    "password": 'password="canary-canary"',
    "key": "-----BEGIN RSA PRIVATE KEY-----\ncanarycanary\n-----END RSA PRIVATE KEY-----",
}
OURS = "a very own secret of 30 letters"


@pytest.fixture
def written(written: io.StringIO) -> io.StringIO:
    logs.register_secret(OURS)
    return written


def clean(text: str) -> bool:
    return "canary" not in text and "c0ffee" not in text and OURS not in text


def test_no_secret_comes_through_any_way_in(written: io.StringIO) -> None:
    for secret in (*CANARIES.values(), OURS):
        log_every_way(secret)
    text = written.getvalue()
    assert clean(text)
    assert text.count("\n") > 8 * len(CANARIES)


def log_every_way(secret: str) -> None:
    log = logging.getLogger("core.somewhere")
    log.info(f"message {secret}")
    log.info("argument %s", secret)
    log.info("mapping %(x)s", {"x": secret})
    log.info("field", extra={"where": secret})
    log.info("nested", extra={"where": [secret], "error": RuntimeError(secret)})
    log.info("wrong arguments %d", secret)
    try:
        try:
            raise ValueError(secret)
        except ValueError as error:
            raise RuntimeError(f"because of {secret}") from error
    except RuntimeError:
        log.exception("failed")
    try:
        raise ExceptionGroup("several", [OSError(secret)])
    except ExceptionGroup:
        log.exception("failed")
    logging.getLogger("aiogram.client").warning("other library %s", secret)


def test_a_handler_of_another_library_gets_clean_records_too(written: io.StringIO) -> None:
    own = io.StringIO()
    other = logging.getLogger("somelibrary")
    handler = logging.StreamHandler(own)
    other.addHandler(handler)
    other.error("token %s", CANARIES["slack bot"])
    other.removeHandler(handler)
    assert clean(own.getvalue())
    assert "token" in own.getvalue()


def test_warnings_and_crashes_of_threads_go_the_same_way(written: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"careful with {CANARIES['slack bot']}", stacklevel=1)

    def crash() -> None:
        raise RuntimeError(CANARIES["slack app"])

    thread = threading.Thread(target=crash)
    thread.start()
    thread.join()
    try:
        raise RuntimeError(CANARIES["hub"])
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    text = written.getvalue()
    assert clean(text)
    assert "careful" in text
    assert "thread.failed" in text
    assert "program.failed" in text


def test_fields_that_hold_peoples_text_are_not_written(written: io.StringIO) -> None:
    for name in ("text", "body", "payload", "prompt", "messages", "reason", "username"):
        logging.getLogger("core.chat.replies").info("reply.failed", extra={name: "my diary", "row": name})
        assert "diary" not in written.getvalue()
        assert f"row={name}" in written.getvalue()


def test_what_an_error_quotes_is_not_written(written: io.StringIO) -> None:
    try:
        int("my diary")
    except ValueError:
        logging.getLogger("core.chat.replies").exception("reply.crashed")
    try:
        {}["my diary"]
    except KeyError:
        logging.getLogger("core.chat.replies").exception("reply.crashed")
    text = written.getvalue()
    assert "diary" not in text.replace('int("my diary")', "").replace('{}["my diary"]', "")
    assert "ValueError" in text
    assert "KeyError" in text


def test_a_line_break_in_a_name_makes_no_second_line(written: io.StringIO) -> None:
    logging.getLogger("core.x").info("bot.named\nERROR forged", extra={"bot": "a\nb"})
    assert len(written.getvalue().splitlines()) == 1


def test_other_libraries_are_heard_from_warnings_upwards(written: io.StringIO) -> None:
    logging.getLogger("slack_sdk").info("the whole message")
    logging.getLogger("slack_sdk").warning("a warning")
    logging.getLogger("core.x").debug("ours")
    assert "whole message" not in written.getvalue()
    assert "a warning" in written.getvalue()
    assert "ours" in written.getvalue()


def test_an_event_and_its_fields_are_one_line(written: io.StringIO) -> None:
    logging.getLogger("core.x").warning(
        "adapter.loaded", extra={"adapter": "acme@4", "seconds": 1.5, "what": "two words"}
    )
    line = written.getvalue()
    assert line.rstrip().endswith('WARNING adapter.loaded adapter=acme@4 seconds=1.5 what="two words"')
