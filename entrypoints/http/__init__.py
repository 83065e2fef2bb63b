"""The HTTP server: routes and handlers, bodies, errors in OpenAI's form, the picture store, listening."""
