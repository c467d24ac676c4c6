-- Schema of release 0.1.0, grouped by the package of core/ that owns the tables. Never changed once released.
--
-- People's messages are only in inbox.payload, delivery.body, turn.text, example, comparison.question and job.shown,
-- all encrypted (core.storage.cipher) and short-lived; channel.instructions is plain text. Users and messages are
-- keyed hashes. Times are milliseconds since 1970. Money is integer nano-units of the currency.

-- core/storage

CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

-- core/channels

CREATE TABLE partner (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    share_bps INTEGER NOT NULL DEFAULT 0 CHECK (share_bps BETWEEN 0 AND 10000),  -- of its channels' charges
    created_ms INTEGER NOT NULL,
    weight REAL NOT NULL DEFAULT 1 CHECK (weight > 0)  -- of the engine, beside other partners
) STRICT;

CREATE TABLE adapter_name (
    name TEXT PRIMARY KEY,
    partner_id INTEGER NOT NULL REFERENCES partner,
    champion TEXT REFERENCES adapter DEFERRABLE INITIALLY DEFERRED  -- NULL is base
) STRICT;

CREATE TABLE channel (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    partner_id INTEGER NOT NULL REFERENCES partner,
    adapter TEXT NOT NULL REFERENCES adapter_name,
    instructions TEXT NOT NULL DEFAULT '',
    language TEXT NOT NULL DEFAULT '',
    per_minute INTEGER NOT NULL CHECK (per_minute >= 0),
    per_hour INTEGER NOT NULL CHECK (per_hour >= 0),
    tokens_in INTEGER NOT NULL CHECK (tokens_in >= 0),
    tokens_out INTEGER NOT NULL CHECK (tokens_out > 0),
    temperature REAL NOT NULL DEFAULT 0,
    top_p REAL NOT NULL DEFAULT 1,
    created_ms INTEGER NOT NULL,
    archived_ms INTEGER,
    questions TEXT NOT NULL DEFAULT ''  -- one a line
) STRICT;

CREATE TABLE binding (  -- place '' is the account's default channel
    platform TEXT NOT NULL,
    account TEXT NOT NULL,
    place TEXT NOT NULL DEFAULT '',
    channel_id INTEGER NOT NULL REFERENCES channel,
    PRIMARY KEY (platform, account, place)
) STRICT, WITHOUT ROWID;

CREATE TABLE person (
    user_hash TEXT PRIMARY KEY,
    platform TEXT NOT NULL,
    language TEXT NOT NULL DEFAULT '',
    first_ms INTEGER NOT NULL,
    last_ms INTEGER NOT NULL,
    channel_id INTEGER REFERENCES channel  -- whose link they used
) STRICT;

CREATE TABLE operator (  -- channel_id NULL is every channel
    id INTEGER PRIMARY KEY,
    user_hash TEXT NOT NULL,
    channel_id INTEGER REFERENCES channel,
    label TEXT NOT NULL,
    granted_by TEXT NOT NULL,
    granted_ms INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX operator_once ON operator (user_hash, ifnull(channel_id, 0));

CREATE TABLE invite (
    code_hash TEXT PRIMARY KEY,
    channel_id INTEGER REFERENCES channel,
    label TEXT NOT NULL,
    made_by TEXT NOT NULL,
    made_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    claimed_by TEXT,
    claimed_ms INTEGER
) STRICT;

CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,
    actor TEXT NOT NULL,
    platform TEXT NOT NULL,
    action TEXT NOT NULL,
    target TEXT NOT NULL DEFAULT '',
    allowed INTEGER NOT NULL CHECK (allowed IN (0, 1)),
    before TEXT NOT NULL DEFAULT '',
    after TEXT NOT NULL DEFAULT ''
) STRICT;

CREATE TABLE installation (
    platform TEXT NOT NULL,
    account TEXT NOT NULL,
    sealed BLOB NOT NULL,  -- the bot's JSON: tokens, encrypted with the key of the home
    changed_ms INTEGER NOT NULL,
    PRIMARY KEY (platform, account)
) STRICT, WITHOUT ROWID;

CREATE TABLE install_state (
    hash TEXT PRIMARY KEY,
    platform TEXT NOT NULL,
    link TEXT NOT NULL,
    made_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- core/adapters

CREATE TABLE adapter (
    sha256 TEXT PRIMARY KEY,
    name TEXT NOT NULL REFERENCES adapter_name,
    version INTEGER NOT NULL CHECK (version > 0),
    base_fingerprint TEXT NOT NULL,
    dataset_sha256 TEXT,
    manifest TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    unpublished_ms INTEGER,
    unpublished_reason TEXT,
    UNIQUE (name, version)
) STRICT;

CREATE TABLE promotion (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL REFERENCES adapter_name,
    from_sha256 TEXT REFERENCES adapter,
    to_sha256 TEXT REFERENCES adapter,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    at_ms INTEGER NOT NULL,
    undone_ms INTEGER
) STRICT;

-- core/chat

CREATE TABLE conversation (  -- ids are never reused: the engine's prefix cache is keyed by them
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    platform TEXT NOT NULL,
    account TEXT NOT NULL,
    place TEXT NOT NULL,
    conversation TEXT NOT NULL,
    channel_id INTEGER NOT NULL REFERENCES channel,
    started_ms INTEGER NOT NULL,
    UNIQUE (platform, account, place, conversation)
) STRICT;

CREATE TABLE inbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    platform TEXT NOT NULL,
    account TEXT NOT NULL,
    place TEXT NOT NULL,
    conversation TEXT NOT NULL,
    reply_to TEXT NOT NULL,
    user_hash TEXT NOT NULL,
    lane TEXT NOT NULL CHECK (lane IN ('control', 'turn')),
    kind TEXT NOT NULL,
    language TEXT NOT NULL,
    update_key TEXT NOT NULL,
    message_key TEXT NOT NULL,
    payload BLOB,
    received_ms INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('new', 'running', 'generated', 'done', 'dead')),
    outcome TEXT NOT NULL DEFAULT '',  -- of done and dead: replied, command, refused, failed, control
    attempts INTEGER NOT NULL DEFAULT 0,
    closed_ms INTEGER,
    UNIQUE (platform, account, update_key)
) STRICT;

CREATE UNIQUE INDEX inbox_message ON inbox (platform, account, message_key) WHERE message_key <> '';

CREATE INDEX inbox_open ON inbox (platform, account, place, conversation, id)
    WHERE state IN ('new', 'running', 'generated');

CREATE INDEX inbox_user ON inbox (user_hash, received_ms);

CREATE INDEX inbox_dead ON inbox (outcome) WHERE state = 'dead';

CREATE TABLE turn (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id INTEGER NOT NULL REFERENCES conversation,
    inbox_id INTEGER NOT NULL REFERENCES inbox,
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
    text BLOB NOT NULL,
    user_hash TEXT NOT NULL,
    at_ms INTEGER NOT NULL,
    refused INTEGER NOT NULL DEFAULT 0 CHECK (refused IN (0, 1))  -- 1: never learn from it
) STRICT;

CREATE INDEX turn_conversation ON turn (conversation_id, id);

CREATE INDEX turn_user ON turn (user_hash);

CREATE TABLE generation (
    id TEXT PRIMARY KEY,
    inbox_id INTEGER NOT NULL UNIQUE REFERENCES inbox,
    channel_id INTEGER NOT NULL REFERENCES channel,
    user_hash TEXT NOT NULL,
    adapter TEXT REFERENCES adapter,  -- NULL is base
    price_id INTEGER NOT NULL REFERENCES price,
    seed INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'generated', 'delivered', 'failed')),
    finish TEXT NOT NULL DEFAULT '',
    tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_reused INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0,
    started_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    retry INTEGER NOT NULL DEFAULT 0 CHECK (retry IN (0, 1))  -- another answer to the last question
) STRICT;

CREATE INDEX generation_user ON generation (user_hash, started_ms);

CREATE TABLE feedback (
    generation_id TEXT NOT NULL REFERENCES generation,
    user_hash TEXT NOT NULL,
    vote INTEGER NOT NULL CHECK (vote IN (-1, 1)),
    at_ms INTEGER NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (generation_id, user_hash)
) STRICT, WITHOUT ROWID;

CREATE TABLE example (  -- a delivered reply that may be learned from; its texts are encrypted
    generation_id TEXT PRIMARY KEY REFERENCES generation,
    channel_id INTEGER NOT NULL REFERENCES channel,
    user_hash TEXT NOT NULL,  -- who was answered
    platform TEXT NOT NULL,
    shared INTEGER NOT NULL CHECK (shared IN (0, 1)),  -- 1: allowed for this reply, with or without consent
    said BLOB NOT NULL,
    correction BLOB,
    corrected_by TEXT,
    at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX example_user ON example (user_hash);

CREATE TABLE comparison (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    inbox_id INTEGER NOT NULL UNIQUE,
    channel_id INTEGER NOT NULL REFERENCES channel,
    candidate TEXT NOT NULL REFERENCES adapter,
    other TEXT REFERENCES adapter,  -- the champion then; NULL is base
    candidate_first INTEGER NOT NULL CHECK (candidate_first IN (0, 1)),
    question BLOB,
    actor TEXT NOT NULL,
    at_ms INTEGER NOT NULL,
    chosen TEXT CHECK (chosen IN ('candidate', 'other', 'same')),
    chosen_ms INTEGER,
    typed INTEGER NOT NULL DEFAULT 1 CHECK (typed IN (0, 1))  -- 0: the question is a test row's
) STRICT;

CREATE INDEX comparison_candidate ON comparison (candidate);

-- core/delivery

CREATE TABLE delivery (
    id INTEGER PRIMARY KEY,
    inbox_id INTEGER UNIQUE REFERENCES inbox,
    job_id INTEGER UNIQUE REFERENCES job DEFERRABLE INITIALLY DEFERRED,
    body BLOB,
    state TEXT NOT NULL CHECK (state IN ('open', 'generated', 'done', 'failed')),
    CHECK ((inbox_id IS NULL) <> (job_id IS NULL))
) STRICT;

CREATE TABLE part (
    delivery_id INTEGER NOT NULL REFERENCES delivery,
    number INTEGER NOT NULL,
    handle TEXT NOT NULL,
    receipt TEXT,
    PRIMARY KEY (delivery_id, number)
) STRICT, WITHOUT ROWID;

-- core/usage

CREATE TABLE price (
    id INTEGER PRIMARY KEY,
    channel_id INTEGER NOT NULL REFERENCES channel,
    valid_from_ms INTEGER NOT NULL,
    in_nano INTEGER NOT NULL CHECK (in_nano >= 0),
    out_nano INTEGER NOT NULL CHECK (out_nano >= 0),
    share_bps INTEGER NOT NULL CHECK (share_bps BETWEEN 0 AND 10000),
    train_nano INTEGER NOT NULL DEFAULT 0 CHECK (train_nano >= 0),
    UNIQUE (channel_id, valid_from_ms)
) STRICT;

CREATE TABLE ledger (  -- each row charges one generation or one job
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL CHECK (kind IN ('usage', 'reversal')),
    generation_id TEXT,
    day TEXT NOT NULL,
    channel_id INTEGER NOT NULL REFERENCES channel,
    price_id INTEGER NOT NULL REFERENCES price,
    tokens_in INTEGER NOT NULL,
    tokens_reused INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL,
    gross_nano INTEGER NOT NULL,
    partner_nano INTEGER NOT NULL,
    owner_nano INTEGER NOT NULL,
    booked_ms INTEGER NOT NULL,
    job_id INTEGER REFERENCES job CHECK ((generation_id IS NULL) <> (job_id IS NULL)),
    tokens_trained INTEGER NOT NULL DEFAULT 0,
    UNIQUE (generation_id, kind),
    CHECK (gross_nano = partner_nano + owner_nano)
) STRICT;

CREATE UNIQUE INDEX ledger_job ON ledger (job_id, kind) WHERE job_id IS NOT NULL;

CREATE TABLE usage_daily (
    day TEXT NOT NULL,
    channel_id INTEGER NOT NULL REFERENCES channel,
    price_id INTEGER NOT NULL REFERENCES price,
    replies INTEGER NOT NULL,
    tokens_in INTEGER NOT NULL,
    tokens_reused INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL,
    gross_nano INTEGER NOT NULL,
    partner_nano INTEGER NOT NULL,
    owner_nano INTEGER NOT NULL,
    jobs INTEGER NOT NULL DEFAULT 0,
    tokens_trained INTEGER NOT NULL DEFAULT 0,
    jobs_nano INTEGER NOT NULL DEFAULT 0,  -- the jobs' part of gross_nano
    PRIMARY KEY (day, channel_id, price_id)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER ledger_rolls_up AFTER INSERT ON ledger BEGIN
    INSERT INTO usage_daily VALUES (
        NEW.day, NEW.channel_id, NEW.price_id,
        iif(NEW.job_id IS NULL, iif(NEW.kind = 'usage', 1, -1), 0),
        NEW.tokens_in, NEW.tokens_reused, NEW.tokens_out, NEW.gross_nano, NEW.partner_nano, NEW.owner_nano,
        iif(NEW.job_id IS NULL, 0, iif(NEW.kind = 'usage', 1, -1)),
        NEW.tokens_trained, iif(NEW.job_id IS NULL, 0, NEW.gross_nano))
    ON CONFLICT DO UPDATE SET
        replies = replies + excluded.replies, tokens_in = tokens_in + excluded.tokens_in,
        tokens_reused = tokens_reused + excluded.tokens_reused, tokens_out = tokens_out + excluded.tokens_out,
        gross_nano = gross_nano + excluded.gross_nano, partner_nano = partner_nano + excluded.partner_nano,
        owner_nano = owner_nano + excluded.owner_nano, jobs = jobs + excluded.jobs,
        tokens_trained = tokens_trained + excluded.tokens_trained, jobs_nano = jobs_nano + excluded.jobs_nano;
END;

CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger BEGIN
    SELECT RAISE(ABORT, 'the ledger is append-only');
END;

CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger BEGIN
    SELECT RAISE(ABORT, 'the ledger is append-only');
END;

-- core/privacy

CREATE TABLE consent (
    user_hash TEXT NOT NULL,
    channel_id INTEGER NOT NULL REFERENCES channel,
    granted_ms INTEGER NOT NULL,
    PRIMARY KEY (user_hash, channel_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE erasure (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user_hash TEXT NOT NULL,
    at_ms INTEGER NOT NULL
) STRICT;

-- core/jobs

CREATE TABLE dataset (
    sha256 TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    source TEXT NOT NULL,
    licence TEXT NOT NULL DEFAULT '',
    size_bytes INTEGER NOT NULL,
    brought_by TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    erased_ms INTEGER,
    parent TEXT,  -- sha256 of the data set that it was derived from
    rows INTEGER
) STRICT;

CREATE TABLE dataset_person (  -- people whose messages are in it, with their consent
    dataset_sha256 TEXT NOT NULL REFERENCES dataset,
    user_hash TEXT NOT NULL,
    PRIMARY KEY (dataset_sha256, user_hash)
) STRICT, WITHOUT ROWID;

CREATE TABLE job (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    channel_id INTEGER NOT NULL REFERENCES channel,
    adapter TEXT NOT NULL REFERENCES adapter_name,
    version INTEGER NOT NULL,
    dataset_sha256 TEXT NOT NULL REFERENCES dataset,
    dataset TEXT NOT NULL DEFAULT '',  -- the data set's name in this channel
    state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    result TEXT REFERENCES adapter,
    platform TEXT NOT NULL,
    account TEXT NOT NULL,
    place TEXT NOT NULL,
    conversation TEXT NOT NULL,
    language TEXT NOT NULL,
    actor TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created_ms INTEGER NOT NULL,
    started_ms INTEGER,
    ended_ms INTEGER,
    imported TEXT NOT NULL DEFAULT '',  -- a folder in jobs/, until the job has taken it
    shown BLOB,  -- test rows that operators may see
    preset TEXT NOT NULL DEFAULT '',
    columns TEXT NOT NULL DEFAULT '',  -- of the data set, where named: JSON
    asked_ms INTEGER,
    redact INTEGER NOT NULL DEFAULT 0,
    price_id INTEGER REFERENCES price,  -- NULL: nothing is trained
    tokens_agreed INTEGER,  -- the most that is charged; NULL: no estimate was shown
    UNIQUE (adapter, version)
) STRICT;

CREATE TABLE job_event (
    job_id INTEGER NOT NULL REFERENCES job,
    seq INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job_id, seq)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER dataset_erased AFTER UPDATE OF erased_ms ON dataset WHEN NEW.erased_ms IS NOT NULL BEGIN
    UPDATE job SET shown = NULL WHERE dataset_sha256 = NEW.sha256;
    UPDATE comparison SET question = NULL
    WHERE candidate IN (SELECT result FROM job WHERE dataset_sha256 = NEW.sha256);
END;
