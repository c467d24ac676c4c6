"""The service: channels, chat, money, fine-tunes, and the engine that answers.

Low to high, a package imports only those before it: types, errors; files, i18n, charts; config, platform; storage,
model; commands (table and parser), delivery, engine; observability, usage (prices, ledger, limits); channels;
adapters, privacy; jobs (fine-tunes); chat (one message, from update to settled reply).

Entry points: core.chat.service.Service for bots, core.engine.protocol.Engine for engines, core.platform.Bot for
platforms. Imports neither bots nor finetune.
"""
