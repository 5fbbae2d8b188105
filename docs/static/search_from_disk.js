// A page opened from disk may not fetch others. Search then lists titles, without an excerpt of each page.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
