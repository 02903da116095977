"""The dashboards, in the order in which they answer questions."""

from dashboards import at_a_glance, cache, memory, session, speed

PAGES = (at_a_glance.PAGE, session.PAGE, cache.PAGE, speed.PAGE, memory.PAGE)
