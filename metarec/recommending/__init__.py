"""What a recommender does beside ranking: search, preferences, profiles, explanations, its files."""
