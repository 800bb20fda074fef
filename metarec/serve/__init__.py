"""The HTTP service: a rating arrives, the user's adapter is computed again, and the next ranking uses it.

From HTTP to the model: `guard` checks who may ask and how often, `app` has the routes and `page` the HTML, `service`
and `worker` queue requests, `engine` adapts and ranks, `store` keeps feedback and adapters.
"""
