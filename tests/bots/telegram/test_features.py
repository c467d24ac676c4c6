# ruff: noqa: E501
"""What the Telegram bot promises, and the tests that hold it to that. A row without a test fails."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FEATURES: dict[str, str] = {
    "own long polling; the offset moves only after the commit": "intake::test_the_offset_moves_only_after_the_commit",
    "webhook: 200 only after the commit": "intake::test_a_webhook_says_200_only_after_the_commit",
    "webhook: secret mandatory": "intake::test_a_webhook_without_a_secret_is_refused",
    "webhook: constant time, own path, 401, body limit": "intake::test_1000_forged_webhook_requests_are_all_401",
    "updates are read one by one, dead ones are kept": "intake::test_an_update_that_cannot_be_read_is_kept_and_stops_nothing",
    "many accounts in one process": "intake::test_many_accounts_in_one_process",
    "repeats, gaps, reordering, new ids": "intake::test_repeats_gaps_reordering_and_ids_that_begin_anew",
    "allowed updates": "intake::test_only_what_is_used_is_asked_for",
    "a second poller is explained": "intake::test_a_second_poller_is_explained_and_waited_out",
    "tokens are shown nowhere": "intake::test_tokens_are_in_no_log_no_error_and_no_answer",
    "drafts, edits, draft_direct, off": "streaming::test_every_transport_ends_with_one_whole_answer",
    "drafts are renewed, typing kept alive": "streaming::test_a_draft_is_renewed_before_it_expires_and_typing_is_kept_alive",
    "native stop": "dialogue::test_the_native_stop_button_ends_the_answer_and_what_is_seen_is_charged",
    "edits in groups": "groups::test_an_answer_in_a_group_grows_by_edits_with_a_stop_button",
    "crash table": "streaming::test_a_restart_at_any_point_ends_in_one_answer",
    "pace per chat and for the bot": "streaming::test_telegrams_own_limits_are_kept",
    "retry_after": "streaming::test_nothing_goes_out_before_retry_after",
    "a storm of 429": "streaming::test_a_storm_of_429_loses_nothing_and_is_waited_out",
    "coalesced edits, the final text always": "streaming::test_every_transport_ends_with_one_whole_answer",
    "lost answers of the platform": "streaming::test_what_telegram_takes_without_saying_so_is_not_doubled",
    "Markdown to entities": "text::test_what_it_looks_like",
    "splitting": "text::test_parts_are_the_text_and_no_entity_is_out_of_bounds",
    "code blocks whole": "text::test_a_code_block_that_fits_is_not_cut",
    "adversarial texts": "text::test_500_adversarial_texts_are_all_delivered_whole",
    "rich messages": "streaming::test_tables_and_formulas_can_be_rich_and_fall_back",
    "plain text where entities are refused": "streaming::test_a_parse_error_falls_back_to_plain_text",
    "regenerate": "dialogue::test_again_answers_the_last_question_once_more",
    "stop by command": "dialogue::test_a_stop_command_acts_at_once",
    "thumbs with the adapter version": "dialogue::test_thumbs_are_kept_with_the_answer_and_a_reason",
    "continue": "dialogue::test_a_cut_answer_can_be_continued",
    "start": "dialogue::test_start_says_who_answers_and_offers_questions",
    "deep link": "dialogue::test_a_channels_link_brings_the_person_to_that_channel",
    "help, new, stop, usage, language, privacy, forget": "dialogue::test_every_command_for_everyone_answers",
    "menus by scope, language and role": "operators::test_menus_show_each_person_their_commands",
    "groups: mention and command": "groups::test_a_mention_is_answered_as_a_reply_and_other_talk_is_not",
    "groups: reply": "groups::test_a_reply_to_the_bot_needs_no_name_and_one_to_others_brings_their_words",
    "groups: how to address it": "groups::test_when_it_is_added_it_says_how_to_address_it",
    "topics, General": "groups::test_topics_are_answered_in_their_topic_and_general_without_an_id",
    "DM topics": "dialogue::test_dm_topics_are_conversations_of_their_own",
    "discussion groups": "groups::test_a_discussion_group_is_answered_below_the_post",
    "migration": "groups::test_a_group_that_becomes_a_supergroup_keeps_its_conversation",
    "edited messages": "dialogue::test_an_edit_runs_nothing",
    "replies as context": "dialogue::test_a_reply_brings_what_it_refers_to",
    "blocked bots": "dialogue::test_a_blocked_bot_gives_up_at_once_and_charges_nothing",
    "forwarded text": "dialogue::test_a_forwarded_text_is_a_question_but_never_a_command",
    "media, albums": "dialogue::test_what_has_no_text_is_answered_politely_and_an_album_once",
    "operators by id": "operators::test_an_operator_is_known_by_their_id_not_by_their_name",
    "operator commands in groups": "groups::test_operator_commands_in_a_group_need_a_known_administrator",
    "data set by document": "operators::test_a_file_with_the_caption_finetune_becomes_a_version_in_service",
    "progress in one message": "operators::test_a_running_job_can_be_stopped_from_the_chat",
    "cancel": "operators::test_a_running_job_can_be_stopped_from_the_chat",
    "loss curve": "operators::test_the_loss_curve_comes_as_a_picture",
    "usage chart, CSV": "operators::test_usage_comes_as_a_chart_and_as_a_table",
    "one conversation in order, others beside it": "dialogue::test_a_second_message_waits_its_turn_and_other_chats_do_not",
    "kills": "drill::test_telegram_survives_20_kills",
    "SIGTERM under load": "drill::test_sigterm_under_load_ends_in_time_and_loses_nothing",
}  # fmt: skip
HERE = Path(__file__).parent
FILES = {"drill": HERE.parents[1] / "drill" / "test_telegram.py"}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_has_its_test(feature: str) -> None:
    place, _, name = FEATURES[feature].partition("::")
    path = FILES.get(place, HERE / f"test_{place}.py")
    functions = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = {one.name for one in functions if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in names
