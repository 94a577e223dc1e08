"""Steps of the database schema, run by Alembic. `python -m services.schema "what changes"` writes a new step."""
