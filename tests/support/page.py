"""An HTML page as a browser takes it, to see that what others wrote stays text in it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The elements of a page, and the text of each cell of its tables."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.cells, self.in_cell = [], [], False
        self.feed(text)
        self.close()
        self.cells = [cell.strip() for cell in self.cells]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.cells[-1] += data
