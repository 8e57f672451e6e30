"""Settings of Sphinx. tools/docs builds the site with them; the pages of the reference are written anew at each build."""
import re
import sys
from pathlib import Path

from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / 'tools'))

import docs_pages  # noqa: E402

import gluon_optim  # noqa: E402

project = 'gluon_optim'
author = 'the authors of gluon_optim'
release = version = gluon_optim.__version__
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'myst_nb']
exclude_patterns = ['**.ipynb_checkpoints', 'DESCRIPTION.md']  # the latter is for package indexes
html_theme = 'furo'
html_title = f'gluon_optim {release}'
html_static_path = ['site']
html_css_files = ['site.css']
html_show_sphinx = html_show_copyright = False
html_copy_source = html_show_sourcelink = False
pygments_style = 'friendly'
smartquotes_action = 'D'  # dashes; quotes are code more often than not
maximum_signature_line_length = 88

# docstrings: `name` is a link where there is such a name; types are as the text says them
default_role = 'py:obj'
add_module_names = False
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
autodoc_class_signature = 'mixed'
napoleon_google_docstring = False
napoleon_use_param = napoleon_use_rtype = False

myst_heading_anchors = 3
nb_execution_mode = 'force'
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True


def mark_up(app, what, name, value, options, lines):
    """Docstrings are plain text: indented blocks are code, a section ends where a paragraph begins, columns are lists."""
    marked, before, code = [''] * (what == 'property'), '', False  # napoleon takes what is before a colon there for a type
    home = docs_pages.homes(getattr(value, '__module__', name))[0]
    for line in lines:
        indented, after_blank = line.startswith('    '), not (marked and marked[-1])
        code = indented and (code or (after_blank and not before.startswith('    ')))
        if code and after_blank and not before.startswith('    '):
            margin = re.match(r' *(\d+\. )?', before).end()
            marked += [' ' * margin + '::', '']
        if line and after_blank and not indented:
            marked.append('')  # for napoleon: two empty lines end a section
        columns = re.match('(``[^`]+``) {2,}(.*)', line)
        prompt = line.lstrip().startswith(('>>>', '...'))
        marked.append(f'* {columns[1]}: {linked(columns[2], home)}' if columns else line if code or prompt else linked(line, home))
        before = line or before
    lines[:] = marked


def linked(line, home):
    """A line with links to documents and to what is public in the module ``home``, in which bars begin no substitution."""
    def link(name):
        return f':py:obj:`{name} <{home}.{name}>`' if name in docs_pages.public_names(home) else f'`{name}`'

    parts = re.split('(`+[^`]+`+)', line)
    parts[::2] = [re.sub(r'docs/(\w+)\.md', r':doc:`/\1`', part.replace('|', r'\|')) for part in parts[::2]]
    parts[1::2] = [re.sub(r'^`(\w+)`$', lambda found: link(found[1]), part) for part in parts[1::2]]
    return ''.join(parts)


def find_public(app, env, node, contnode):
    """A name that is public in the package, from wherever in it; else no link, as for names of other projects."""
    home, _, name = node.get('reftarget', '').rpartition('.')
    ours = home in ('', 'go') or docs_pages.homes(home)
    if node.get('refdomain') == 'py' and ours and name in docs_pages.public_names():
        document = f'reference/api/{docs_pages.PACKAGE}.{name}'
        return make_refnode(app.builder, node['refdoc'], document, f'{docs_pages.PACKAGE}.{name}', contnode, name)
    return None


def shorten(app, what, name, value, options, signature, returns):
    """Signatures of dataclasses, in which Sphinx cannot read the defaults that dataclasses make."""
    return re.sub(r'~[\w.]+\.', '', signature).replace('<factory>', '...') if signature else signature, returns


def unlink_outside(app, document, source):
    """Links to files of the repository that are not on the site become their text. One to no file stays, and is an error."""
    folder = Path(app.env.doc2path(document)).parent

    def text(link):
        target = (folder / link.group(2)).resolve()
        return link.group(1) if target.exists() and DOCS not in target.parents else link.group()

    if not document.startswith('reference/'):
        source[0] = re.sub(r'\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(?:#[^)]*)?\)', text, source[0])


def setup(app):
    docs_pages.write(DOCS / 'reference')
    app.connect('autodoc-process-docstring', mark_up, priority=400)  # before napoleon
    app.connect('autodoc-process-signature', shorten)
    app.connect('missing-reference', find_public)
    app.connect('source-read', unlink_outside)
