"use strict";

// The description is made anew for each request: reload the page to see jobs that came or went.
window.ui = SwaggerUIBundle({
  url: "/core4/api/v1/openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  docExpansion: "list",
  filter: true,
  tryItOutEnabled: true,
  validatorUrl: null,
  withCredentials: true,
});
