//! Names for addresses: function, file and line, from symbol tables and DWARF.

use std::collections::HashMap;

use addr2line::Loader;
use serde::Serialize;

/// A place in a program.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Place {
    /// The function, demangled.
    pub function: Option<String>,
    /// Its source file.
    pub file: Option<String>,
    /// The line there.
    pub line: Option<u32>,
    /// The program or library.
    pub module: Option<String>,
    /// The address in it as its file has it; without a module, in the process.
    pub address: u64,
}

/// Looks addresses up, each program and library read once.
#[derive(Default)]
pub(crate) struct Symbols {
    loaders: HashMap<String, Option<Loader>>,
    known: HashMap<(String, u64), Vec<Place>>,
}

impl Symbols {
    /// The place to which a call at this address returns, innermost inlined function first; at
    /// least one. `module` is a path; without, nothing is known.
    pub(crate) fn places(&mut self, module: Option<&str>, address: u64) -> Vec<Place> {
        let bare = |module: Option<&str>| {
            let module = module.map(str::to_owned);
            vec![Place { function: None, file: None, line: None, module, address }]
        };
        let Some(module) = module else { return bare(None) };
        if let Some(places) = self.known.get(&(module.to_owned(), address)) {
            return places.clone();
        }
        // What can not be read (gone, replaced, the kernel's own) has no names.
        let loader =
            self.loaders.entry(module.to_owned()).or_insert_with(|| Loader::new(module).ok());
        let places = loader.as_ref().and_then(|loader| look_up(loader, module, address));
        let places =
            places.filter(|places| !places.is_empty()).unwrap_or_else(|| bare(Some(module)));
        self.known.insert((module.to_owned(), address), places.clone());
        places
    }
}

fn look_up(loader: &Loader, module: &str, address: u64) -> Option<Vec<Place>> {
    // The call is the instruction before the one that it returns to.
    let call = address.checked_sub(1)?;
    let mut places = Vec::new();
    let mut frames = loader.find_frames(call).ok()?;
    while let Ok(Some(frame)) = frames.next() {
        let function = frame.function.and_then(|name| Some(name.demangle().ok()?.into_owned()));
        let location = frame.location;
        places.push(Place {
            function,
            file: location.as_ref().and_then(|l| l.file).map(str::to_owned),
            line: location.as_ref().and_then(|l| l.line),
            module: Some(module.to_owned()),
            address,
        });
    }
    // Without DWARF, or without a function there: the symbol table knows the outermost.
    let symbol = || {
        loader
            .find_symbol(call)
            .map(|name| addr2line::demangle_auto(name.into(), None).into_owned())
    };
    match places.last_mut() {
        Some(outermost) if outermost.function.is_none() => outermost.function = symbol(),
        Some(_) => {}
        None => places.push(Place {
            function: Some(symbol()?),
            file: None,
            line: None,
            module: Some(module.to_owned()),
            address,
        }),
    }
    Some(places)
}

impl std::fmt::Display for Place {
    /// `function (file:line)`, with as much of it as is known.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let module = self.module.as_deref().map(|path| path.rsplit('/').next().unwrap_or(path));
        match (&self.function, module) {
            (Some(function), _) => write!(f, "{function}")?,
            (None, Some(module)) => write!(f, "{module}+{:#x}", self.address)?,
            (None, None) => write!(f, "{:#x}", self.address)?,
        }
        match (&self.file, self.line, module) {
            (Some(file), Some(line), _) => write!(f, " ({file}:{line})"),
            (Some(file), None, _) => write!(f, " ({file})"),
            (None, _, Some(module)) if self.function.is_some() => write!(f, " ({module})"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where this function's own file lies in memory, and its path.
    fn load_address() -> (u64, String) {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux");
        let exe = std::env::current_exe().expect("Linux").display().to_string();
        let line = maps.lines().find(|line| line.ends_with(&exe)).expect("it runs");
        let start = line.split('-').next().expect("a range");
        (u64::from_str_radix(start, 16).expect("a number"), exe)
    }

    #[inline(never)]
    fn well_known_name() -> u64 {
        well_known_name as *const () as u64
    }

    #[test]
    fn a_function_of_this_test_is_found_with_its_line() {
        let (base, exe) = load_address();
        let offset = well_known_name() - base + 1;
        let places = Symbols::default().places(Some(&exe), offset);
        let function = places[0].function.as_deref().expect("it has a name");
        assert!(function.contains("well_known_name"), "{places:?}");
        assert!(places[0].file.as_deref().is_some_and(|f| f.ends_with("symbols.rs")), "{places:?}");
        assert!(places[0].line.is_some());
    }

    #[test]
    fn what_has_no_name_is_shown_by_address() {
        let mut symbols = Symbols::default();
        assert_eq!(symbols.places(None, 0x1234)[0].to_string(), "0x1234");
        assert_eq!(symbols.places(Some("/absent/lib.so"), 16)[0].to_string(), "lib.so+0x10");
        assert_eq!(symbols.places(Some("/proc/self/exe"), 0)[0].to_string(), "exe+0x0");
    }
}
