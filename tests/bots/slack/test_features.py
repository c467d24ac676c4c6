# ruff: noqa: E501
"""What the Slack bot promises, and the tests that hold it to that. A row without a test fails."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FEATURES: dict[str, str] = {
    "committed before it is acknowledged, by Socket Mode and HTTP": "intake::test_nothing_is_acknowledged_before_it_is_committed",
    "the commit is ahead of any network call; unknown events are acknowledged": "intake::test_the_commit_stands_ahead_of_any_call_to_slack",
    "retries and replays have one effect": "intake::test_1000_replays_have_one_effect",
    "deduplicated by channel and ts": "intake::test_a_mention_that_comes_as_two_events_is_answered_once",
    "events that cannot be read are kept": "intake::test_what_cannot_be_read_is_kept_and_stops_nothing",
    "signed rubbish is kept": "intake::test_what_is_signed_and_no_json_is_kept_and_acknowledged",
    "url verification": "intake::test_slacks_own_question_is_answered",
    "verification failures are 401": "intake::test_10000_forged_requests_are_all_401",
    "settings are explained": "intake::test_what_is_missing_or_wrong_is_told",
    "OAuth, links of partners": "workspaces::test_a_workspace_installs_by_a_link_and_gets_the_channel_of_that_link",
    "success and failure pages": "workspaces::test_the_pages_are_in_the_persons_language_and_harmless",
    "single-use state": "workspaces::test_of_two_racing_uses_of_one_state_one_wins",
    "the state belongs to a browser and ends": "workspaces::test_a_state_counts_in_its_own_browser_only_and_not_for_ever",
    "tokens encrypted at rest, in no log": "workspaces::test_tokens_are_in_no_file_no_log_and_no_error",
    "token rotation": "workspaces::test_a_token_that_ends_soon_is_renewed_once_and_kept",
    "uninstall and revocation": "workspaces::test_who_throws_the_app_out_is_forgotten_and_can_come_back",
    "late and replayed removals": "workspaces::test_late_or_replayed_news_of_a_removal_do_not_remove_what_was_installed_since",
    "a DM to who installs it": "workspaces::test_who_installs_it_gets_one_dm_that_says_where_things_are",
    "token rotation that fails": "workspaces::test_a_token_that_cannot_be_renewed_is_used_until_it_ends",
    "token rotation on a full disk": "workspaces::test_what_was_renewed_while_the_disk_was_full_is_kept_as_soon_as_it_can_be",
    "the simple token beside installations": "workspaces::test_a_workspace_of_its_own_token_and_those_that_installed_live_side_by_side",
    "nothing from a browser is an error of ours": "workspaces::test_whatever_a_browser_sends_it_is_never_an_error_of_ours",
    "Enterprise Grid": "workspaces::test_an_organisation_installs_for_all_its_workspaces",
    "Enterprise Grid: people": "workspaces::test_in_a_workspace_of_an_organisation_people_are_the_same_whatever_slack_calls_their_team",
    "50 workspaces at once": "workspaces::test_50_workspaces_at_once_see_nothing_of_each_other",
    "streams in DMs and threads": "dialogue::test_a_question_in_a_dm_is_answered_once_in_its_thread",
    "post and update": "streaming::test_where_no_stream_is_to_be_had_the_answer_is_posted_and_edited",
    "both transports end whole": "streaming::test_every_transport_ends_with_one_whole_answer",
    "appends are never repeated": "streaming::test_an_append_with_unknown_outcome_is_never_repeated",
    "never a second stream": "streaming::test_a_start_whose_answer_is_lost_leaves_one_orphan_and_no_second_stream",
    "at most one more first message": "streaming::test_a_first_message_of_which_nobody_knows_is_posted_once_more_and_not_again",
    "a final text that is refused": "streaming::test_what_slack_does_not_take_is_written_plainer",
    "a message that was removed": "streaming::test_an_answer_whose_message_was_removed_is_posted_anew",
    "expired streams": "streaming::test_a_stream_that_expires_is_recovered",
    "crash table": "streaming::test_a_restart_in_the_middle_of_a_stream_ends_in_one_answer",
    "retry_after": "streaming::test_nothing_goes_out_before_retry_after",
    "rate buckets": "streaming::test_slacks_own_rates_are_kept_under_load",
    "splitting": "streaming::test_long_answers_are_split_within_slacks_limits",
    "code blocks that are cut": "streaming::test_a_code_block_that_is_cut_is_whole_in_each_message",
    "network cuts, refreshes, expiry at every phase": "streaming::test_what_is_cut_at_every_phase_ends_whole_and_once",
    "socket refresh and cut": "streaming::test_a_socket_that_is_refreshed_or_cut_in_mid_answer_loses_nothing",
    "revoked in mid answer": "streaming::test_a_workspace_that_cannot_be_reached_ends_the_reply_without_a_charge",
    "no pings, no unfurls": "dialogue::test_nothing_pings_anybody",
    "code and addresses as they are": "streaming::test_code_and_addresses_stay_as_they_are",
    "links that people name": "intake::test_the_words_of_a_link_reach_the_model",
    "status with loading messages, sessions": "dialogue::test_slack_is_told_what_is_going_on",
    "native stop, stop button, /stop": "dialogue::test_an_answer_can_be_stopped_and_what_was_seen_is_charged",
    "regenerate, thumbs": "dialogue::test_again_and_thumbs",
    "agent DM with suggested prompts": "dialogue::test_the_agents_dm_offers_the_channels_questions",
    "threads are conversations, from our own store": "dialogue::test_a_thread_is_one_conversation_and_another_is_another",
    "mentions, threads of others": "dialogue::test_in_a_channel_only_who_names_it_is_answered_in_the_thread",
    "message shortcut, modal": "dialogue::test_ask_about_this_message_opens_a_modal_and_answers_in_the_thread",
    "message shortcut where the app is no member": "dialogue::test_where_the_app_is_no_member_it_answers_about_a_message_in_a_dm",
    "message shortcut for long messages": "dialogue::test_the_modal_opens_for_a_long_message_in_any_script",
    "slash command": "dialogue::test_the_slash_command_runs_commands_and_takes_questions_and_answers_in_a_dm",
    "the commands of everywhere": "dialogue::test_every_command_for_everyone_answers",
    "Slack Connect": "dialogue::test_a_guest_of_another_workspace_is_somebody_of_their_own",
    "edits, deletions, bots": "dialogue::test_bots_and_edits_and_deletions_run_nothing",
    "files without text": "dialogue::test_a_file_without_text_is_answered_politely",
    "invited to a channel": "dialogue::test_invited_to_a_channel_it_says_how_to_address_it",
    "data set by file, progress in one message, loss curve": "operators::test_a_shared_file_becomes_a_version_in_service",
    "roles": "operators::test_strangers_are_refused",
    "operators by id": "operators::test_an_operator_is_known_by_their_id",
    "files that cannot be had": "operators::test_a_file_that_cannot_be_had_is_named_with_the_way_out",
    "usage chart, CSV": "operators::test_usage_comes_as_a_chart_and_as_a_table",
    "App Home: what is left, own buttons": "home::test_a_person_sees_what_is_left_and_no_operators_things",
    "App Home: chart, limits, adapter, jobs": "home::test_an_operator_sees_chart_limits_version_and_jobs",
    "App Home: chart where Slack draws none": "home::test_where_slack_draws_no_charts_yet_the_home_says_it_in_letters",
    "App Home: jobs ended": "home::test_a_running_job_can_be_looked_at_and_ended_from_the_home",
    "modal to change limits by role, view errors": "home::test_limits_are_changed_by_a_modal_and_by_role",
    "modal to change instructions": "home::test_instructions_are_changed_word_for_word",
    "modal to change the adapter, options; data set by modal": "home::test_a_file_in_a_modal_becomes_a_version_that_is_chosen_in_another",
    "modals by role": "home::test_who_is_no_operator_any_more_gets_no_modal_but_a_new_home",
    "follow-ups in threads": "dialogue::test_what_follows_in_a_thread_needs_no_mention_where_the_thread_began_with_one",
    "people's languages": "dialogue::test_notices_are_in_the_language_in_which_a_person_reads_slack",
    "commands as they are typed in Slack": "dialogue::test_commands_are_spelled_as_they_are_typed_in_slack_and_the_models_words_stay",
    "manifest current": "operators::test_the_manifest_is_current",
    "README and deploy/ as they can be tried": "operators::test_what_the_docs_say_can_be_typed",
    "manifest: agent view": "operators::test_the_manifest_holds_what_slack_takes",
    "dialogues shared with Telegram": "shared::test_the_table_of_dialogues",
    "data set, verdict, promotion, as in Telegram": "shared::test_a_file_becomes_a_version_in_service_and_goes_out_again",
    "limits, as in Telegram": "shared::test_a_limit_is_said_once_and_nothing_is_charged_beyond_it",
    "kills": "drill::test_slack_survives_20_kills",
}  # fmt: skip
HERE = Path(__file__).parent
FILES = {"drill": HERE.parents[1] / "drill" / "test_slack.py", "shared": HERE.parent / "test_shared.py"}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_has_its_test(feature: str) -> None:
    place, _, name = FEATURES[feature].partition("::")
    path = FILES.get(place, HERE / f"test_{place}.py")
    functions = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = {one.name for one in functions if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert name in names
