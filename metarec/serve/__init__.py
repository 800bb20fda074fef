"""The HTTP service: feedback comes in, an adapter goes to work, a new ranking goes out.

``engine`` knows the recommender and the store, ``worker`` the queue, ``app`` the routes, ``guard`` who may ask and how
often, ``page`` the HTML. None of them knows how a recommender was trained.
"""
