"""Checks a book made by mdBook: every document is in it, every link and picture leads somewhere, search finds words.

book.py FOLDER
"""

import html.parser
import os
import re
import sys
import urllib.parse


class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.ids = path, [], set()
        with open(path, encoding="utf-8") as file:
            self.feed(file.read())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.add(attributes["id"])
        self.links += [value for name, value in attributes.items() if name in ("href", "src") and value]


def resolve(page, link, folder):
    """The file that a link leads to, and the part of it."""
    path, _, part = link.partition("#")
    path = urllib.parse.unquote(path)
    target = page if not path else os.path.normpath(os.path.join(os.path.dirname(page), path))
    if os.path.isdir(target) and not os.path.exists(os.path.join(target, "index.html")):
        names = "".join(f'<li><a href="{name}">{name}</a>' for name in sorted(os.listdir(target)))
        with open(os.path.join(target, "index.html"), "w") as file:
            file.write(f"<!doctype html><title>{path}</title><ul>{names}</ul>\n")
    if os.path.isdir(target):
        target = os.path.join(target, "index.html")
    assert os.path.commonpath([folder, target]) == folder, f"{page}: {link} leads out of the book"
    return target, urllib.parse.unquote(part)


def main(folder):
    folder = os.path.abspath(folder)
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names if name.endswith(".html")]
    # print.html is all pages in one, with its own names of headings; 404.html has links of the site's root.
    pages = {path: Page(path) for path in paths if os.path.basename(path) not in ("print.html", "404.html", "toc.html")}
    checked, wrong = 0, []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            target, part = resolve(path, link, folder)
            if not os.path.exists(target):
                wrong.append(f"{os.path.relpath(path, folder)}: {link}")
            elif part and target in pages and part not in pages[target].ids:
                wrong.append(f"{os.path.relpath(path, folder)}: {link}: no such heading")
            checked += 1
    assert not wrong, "\n".join(wrong)
    for name in os.listdir("docs"):
        if name.endswith(".md") and name != "SUMMARY.md":
            assert f"{folder}/docs/{name.removesuffix('.md')}.html" in pages, f"{name} is not in docs/SUMMARY.md"
    [index] = [name for name in os.listdir(folder) if name.startswith("searchindex")]
    with open(os.path.join(folder, index), encoding="utf-8") as file:
        words = file.read()
    assert all(word in words for word in ("MiniLbQueueFull", "shutdown", "bootstrap")), "search"
    assert checked > 500, checked
    print(f"{len(pages)} pages with {checked} links, in {os.path.relpath(folder)}")


main(sys.argv[1])
