"""Grafana dashboards as code: `python -m dashboards` writes generated/ from the pages here.

A page is a file: at_a_glance, session, cache, speed, memory, each in the order in which it is read.
Queries are named in queries, panels of several pages are in shared, what all panels have in common in
style and palette, and page makes JSON of it.
"""

import warnings

with warnings.catch_warnings():
    # The SDK prefers a newer form of dashboards, which Grafana does not provision from files.
    warnings.simplefilter("ignore", DeprecationWarning)
    import grafana_foundation_sdk.builders.dashboard
    import grafana_foundation_sdk.models.dashboardv2beta1  # noqa: F401
