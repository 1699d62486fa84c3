"""Stand-in: the inference client imports it to read keys of services that are not used here."""

load_dotenv = None
