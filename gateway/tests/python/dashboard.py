"""Parses a dashboard with Grafana's own library and prints it again.

    dashboard.py FILE
"""

import json
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

register_default_plugins()
with open(sys.argv[1], encoding="utf-8") as file:
    print(JSONEncoder().encode(Dashboard.from_json(json.load(file))))
