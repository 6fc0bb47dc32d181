"""The leaderboard's medical benchmarks."""
