-- A message that ran while the process crashed is a suspect: it is tried again alone, and a crash then is a strike.

ALTER TABLE inbox ADD COLUMN begun TEXT NOT NULL DEFAULT '' CHECK (begun IN ('', 'taken', 'beside', 'alone'));
ALTER TABLE inbox ADD COLUMN suspect INTEGER NOT NULL DEFAULT 0;
ALTER TABLE inbox ADD COLUMN strikes INTEGER NOT NULL DEFAULT 0;

-- Bounds count the open rows of a person.
CREATE INDEX inbox_open_user ON inbox (user_hash, lane) WHERE state IN ('new', 'running', 'generated');
CREATE INDEX audit_refused ON audit (action, actor, at_ms) WHERE NOT allowed;
