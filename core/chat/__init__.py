"""One message, from update to settled reply.

service.py      accepts updates and handles their rows (BotService of core/platform.py); the entry point
inbox.py        accepted updates as rows; conversations.py: their turns; caller.py: author, channel, grant
handler.py      brings one row to its end; dispatch.py runs a command, replies.py generates a reply
admission.py    how many replies are at the engine; stopping.py: who may stop one
basics.py       /start /help /new /stop /retry /inbox; comparisons.py /adapter compare; feedback.py votes and /correct
overview.py     what the pages of bots show

May import every package of core; none of them imports this one.
"""
