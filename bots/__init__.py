"""The application, and the bots of each platform.

app.py             builds the parts and runs the bots
startup.py         progress of loading, ready lines
provisioning.py    partners and channels of the configuration -> the database
control.py         the control socket between `distributary` commands
metrics_server.py  GET /metrics; metrics.py collects what it reports
plugins.py         finds bots by entry point
cli/               the `distributary` command
shared/            what several bots need
slack/ telegram/ terminal/   one folder a platform

Entry point: cli.main.main. A platform's folder imports core.platform, core.i18n, core.commands and bots.shared; the
application imports everything. core and finetune never import bots.
"""
