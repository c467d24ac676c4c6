"""Settings: each is defined once, and every reader takes its bounds from there.

    keys.py      key(): a dataclass field with its help and bounds; Key: validates a value of a file or of a command
    sections.py  what other packages take as values: ModelSettings, EngineSettings, RemoteSettings, HyperParameters
    schema.py    every table of config.toml, the settings of a channel, Config
    loader.py    load_config(): config.toml and the environment -> Config; all mistakes are reported together
    show.py      the configuration in use as text

A bot defines its own table with key() and reads it with loader.read_table(). The limits of a channel are fields of
core.types.Limits. Imports core.types, core.errors and core.i18n.
"""
