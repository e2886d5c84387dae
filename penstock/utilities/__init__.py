"""Where scripts that come from Prefect look for annotations; nothing else lives here."""
