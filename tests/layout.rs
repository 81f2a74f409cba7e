//! No circles between the library's files: each `use`, and each path that begins with `crate`, `super` or `self`, is an
//! edge from its file to the file that defines the item. Tests don't count. `LAYOUT=1` prints the graph.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::Path,
};

use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Attribute, Item, Meta, UseTree,
    punctuated::Punctuated,
    visit::{self, Visit},
};

type Names = Vec<String>;
type Graph = BTreeMap<String, BTreeSet<String>>;

#[derive(Default)]
struct Module {
    file: String,
    defined: BTreeSet<String>,
    /// What `use` brings in: the name here, and the path that it stands for.
    used: Vec<(String, Names)>,
    /// The modules of which `use` brings in everything.
    globs: Vec<Names>,
    paths: Vec<Names>,
}

#[derive(Default)]
struct Library(BTreeMap<Names, Module>);

impl Library {
    fn read() -> Self {
        let mut library = Self::default();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        library.read_file(&source, "lib.rs", Vec::new());
        library
    }

    fn read_file(&mut self, source: &Path, file: &str, module: Names) {
        let text = fs::read_to_string(source.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        self.read_items(source, file, module, parsed.items);
    }

    fn read_items(&mut self, source: &Path, file: &str, module: Names, items: Vec<Item>) {
        let mut read = Module { file: file.to_owned(), ..Module::default() };
        for item in items {
            if !attributes(&item).iter().all(may_hold) {
                continue;
            }
            match item {
                Item::Use(item) => read.use_tree(&item.tree, Vec::new()),
                Item::Mod(item) => {
                    let name = item.ident.to_string();
                    let path = [module.clone(), vec![name.clone()]].concat();
                    match item.content {
                        Some((_, items)) => self.read_items(source, file, path, items),
                        None => self.read_file(source, &file_of(source, &path), path),
                    }
                }
                item => {
                    read.defined.extend(name_of(&item));
                    read.visit_item(&item);
                }
            }
        }
        self.0.insert(module, read);
    }

    fn graph(&self) -> Graph {
        let mut graph = Graph::new();
        for (path, module) in &self.0 {
            let edges = graph.entry(module.file.clone()).or_default();
            let named = module.used.iter().map(|(_, target)| target);
            // A module that is imported says nothing yet: the paths that begin with its name do.
            let named = named.filter(|target| !self.is_module(path, target));
            for target in named.chain(&module.globs).chain(&module.paths) {
                edges.extend(self.file_of(path, target, 0).filter(|file| *file != module.file));
            }
        }
        graph
    }

    fn is_module(&self, from: &Names, target: &Names) -> bool {
        self.absolute(from, target).is_some_and(|path| self.0.contains_key(&path))
    }

    /// A path from the root of the library; none for one that leads out of it.
    fn absolute(&self, from: &Names, path: &[String]) -> Option<Names> {
        let (first, rest) = path.split_first()?;
        let base = match first.as_str() {
            "crate" => Vec::new(),
            "self" => from.clone(),
            "super" => from[..from.len().checked_sub(1)?].to_vec(),
            name => {
                let module = self.0.get(from)?;
                if let Some((_, target)) = module.used.iter().find(|(used, _)| used == name) {
                    let base = Some(target).filter(|target| target[0] != *name);
                    return Some([self.absolute(from, base?)?, rest.to_vec()].concat());
                }
                let child = [from.clone(), vec![name.to_owned()]].concat();
                return self.0.contains_key(&child).then(|| [child, rest.to_vec()].concat());
            }
        };
        match rest.first().map(String::as_str) {
            Some("super") => self.absolute(&base, rest),
            _ => Some([base, rest.to_vec()].concat()),
        }
    }

    /// The file that defines what a path names, through re-exports.
    fn file_of(&self, from: &Names, path: &[String], depth: usize) -> Option<String> {
        assert!(depth < 20, "{path:?} in {from:?} leads nowhere");
        let path = self.absolute(from, path)?;
        // The longest part of it that is a module, and the item in there.
        let end = (0..=path.len()).rev().find(|end| self.0.contains_key(&path[..*end]))?;
        let (module, item) = (&path[..end].to_vec(), path.get(end));
        let found = &self.0[module];
        let Some(item) = item.filter(|item| !found.defined.contains(*item)) else {
            return Some(found.file.clone());
        };
        let used = found.used.iter().find(|(used, _)| used == item).map(|(_, target)| target.clone());
        let by_glob = found.globs.iter().map(|glob| [glob.clone(), vec![item.clone()]].concat());
        let by_glob = by_glob.filter(|target| {
            let defines = |path: &Names| self.0.get(&path[..path.len() - 1]);
            let module = self.absolute(module, target);
            module.is_some_and(|path| defines(&path).is_some_and(|module| module.defined.contains(item)))
        });
        let mut targets = used.into_iter().chain(by_glob);
        // An item of another library counts as one of the module that re-exports it, and so does an item that a macro
        // defines.
        let target = targets.next().and_then(|target| self.file_of(module, &target, depth + 1));
        target.or_else(|| Some(found.file.clone()))
    }
}

impl Module {
    fn use_tree(&mut self, tree: &UseTree, mut path: Names) {
        match tree {
            UseTree::Path(tree) => {
                path.push(tree.ident.to_string());
                self.use_tree(&tree.tree, path);
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.use_tree(tree, path.clone())),
            UseTree::Glob(_) => self.globs.push(path),
            UseTree::Name(name) if name.ident == "self" => {
                self.used.extend(path.last().cloned().map(|name| (name, path)));
            }
            UseTree::Name(name) => {
                path.push(name.ident.to_string());
                self.used.push((name.ident.to_string(), path));
            }
            UseTree::Rename(rename) => {
                path.push(rename.ident.to_string());
                self.used.push((rename.rename.to_string(), path));
            }
        }
    }

    /// Paths in what a macro is given, which is not parsed.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Names = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() => colons += 1,
                TokenTree::Ident(name) if colons == 2 => {
                    path.push(name.to_string());
                    colons = 0;
                }
                token => {
                    self.end_path(std::mem::take(&mut path));
                    colons = 0;
                    match token {
                        TokenTree::Ident(name) => path.push(name.to_string()),
                        TokenTree::Group(group) => self.tokens(group.stream()),
                        _ => {}
                    }
                }
            }
        }
        self.end_path(path);
    }

    fn end_path(&mut self, path: Names) {
        if path.len() > 1 {
            self.paths.push(path);
        }
    }
}

impl Visit<'_> for Module {
    fn visit_path(&mut self, path: &syn::Path) {
        self.end_path(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    fn visit_item_use(&mut self, item: &syn::ItemUse) {
        self.use_tree(&item.tree, Vec::new());
    }

    fn visit_macro(&mut self, item: &syn::Macro) {
        self.visit_path(&item.path);
        self.tokens(item.tokens.clone());
    }
}

fn file_of(source: &Path, module: &Names) -> String {
    let path = module.join("/");
    let file = format!("{path}.rs");
    if source.join(&file).is_file() { file } else { format!("{path}/mod.rs") }
}

fn name_of(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether an item can be part of a build that is no test.
fn may_hold(attribute: &Attribute) -> bool {
    !attribute.path().is_ident("cfg")
        || attribute.parse_args::<Meta>().ok().and_then(|condition| holds(&condition)) != Some(false)
}

/// Whether a condition holds in such a build; none where it depends on something else.
fn holds(condition: &Meta) -> Option<bool> {
    let Meta::List(list) = condition else { return condition.path().is_ident("test").then_some(false) };
    let parts = list.parse_args_with(Punctuated::<Meta, syn::Token![,]>::parse_terminated);
    let parts: Vec<_> = parts.expect("conditions").iter().map(holds).collect();
    let decisive = |value| parts.contains(&Some(value)).then_some(value);
    let all_are = |value| parts.iter().all(|part| *part == Some(value)).then_some(value);
    match list.path.get_ident()?.to_string().as_str() {
        "all" => decisive(false).or(all_are(true)),
        "any" => decisive(true).or(all_are(false)),
        "not" => parts[0].map(|holds| !holds),
        _ => None,
    }
}

/// A circle through that file.
fn circle_through(graph: &Graph, start: &str) -> Option<Vec<String>> {
    let mut came_from = BTreeMap::new();
    let mut front = vec![start.to_owned()];
    while let Some(file) = front.pop() {
        for next in &graph[&file] {
            if next == start {
                let before = |file: &String| came_from.get(file).cloned();
                let mut circle: Vec<_> = std::iter::successors(Some(file), before).collect();
                circle.insert(0, start.to_owned());
                circle.reverse();
                return Some(circle);
            }
            if !came_from.contains_key(next) {
                came_from.insert(next.clone(), file.clone());
                front.insert(0, next.clone());
            }
        }
    }
    None
}

#[test]
fn no_file_imports_what_imports_it() {
    let graph = Library::read().graph();
    if env::var_os("LAYOUT").is_some() {
        for (file, imports) in &graph {
            println!("{file} -> {}", imports.iter().map(String::as_str).collect::<Vec<_>>().join(", "));
        }
    }
    assert!(graph.len() > 50, "only {} files were read", graph.len());
    let circles: BTreeSet<_> = graph
        .keys()
        .filter_map(|file| circle_through(&graph, file))
        .map(|circle| circle.join(" -> "))
        .collect();
    assert!(
        circles.is_empty(),
        "files that import each other:\n{}",
        circles.into_iter().collect::<Vec<_>>().join("\n")
    );
}
