//! Reading a TOML document key by key, and keeping every mistake with its place.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::Problem;

/// A text that stands somewhere.
pub(crate) type Placed<'a> = (Range<usize>, &'a str);

/// What people write for a key that has another name here.
const OTHER_WORDS: [(&str, &str); 12] = [
    ("age", "min_age` or `max_age"),
    ("rss", "min_rss` or `max_rss"),
    ("size", "min_rss` or `min_anon"),
    ("anon", "min_anon` or `max_anon"),
    ("uid", "user"),
    ("command", "comm` or `args"),
    ("cmdline", "args"),
    ("path", "exe"),
    ("service", "unit"),
    ("default", "defaults"),
    ("pid_ns", "pid_namespace"),
    ("label", "partition"),
];

/// A text that is read, and what was found wrong with it so far.
pub(crate) struct Reader<'t> {
    text: &'t str,
    /// Where each line begins: a file of many rules is not counted through for each of them.
    lines: Vec<usize>,
    problems: Vec<Problem>,
}

impl<'t> Reader<'t> {
    /// Reads the document, as far as it can be read. Mistakes of the format itself are problems too.
    pub(crate) fn new(text: &'t str) -> (Self, Spanned<DeTable<'t>>) {
        let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let mut reader = Self { text, lines, problems: Vec::new() };
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            reader.problem(error.span().unwrap_or_default(), error.message().trim().replace('\n', "; "));
        }
        (reader, table)
    }

    /// Notes a mistake.
    pub(crate) fn problem(&mut self, at: Range<usize>, message: impl Into<String>) {
        let line = self.line(at.start);
        let column = self.text[self.lines[line - 1]..self.boundary(at.start)].chars().count() + 1;
        self.problems.push(Problem { line, column, message: message.into() });
    }

    /// The line in which a byte lies, from 1 on.
    pub(crate) fn line(&self, at: usize) -> usize {
        self.lines.partition_point(|begin| *begin <= at)
    }

    fn boundary(&self, at: usize) -> usize {
        let at = at.min(self.text.len());
        (0..=at).rev().find(|at| self.text.is_char_boundary(*at)).unwrap_or(0)
    }

    /// No mistake was found so far.
    pub(crate) fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// All mistakes, in the order of the text.
    pub(crate) fn problems(mut self) -> Vec<Problem> {
        self.problems.sort_by_key(|problem| (problem.line, problem.column));
        self.problems.dedup();
        self.problems
    }

    /// Notes every key of a table that it does not have; `place` is where, as in "in a rule".
    pub(crate) fn only(&mut self, table: &DeTable<'_>, known: &[&str], place: &str) {
        for key in table.keys() {
            let word: &str = key.get_ref();
            if !known.contains(&word) {
                let message = format!("unknown key `{word}` {place}{}", suggestion(word, known));
                self.problem(key.span(), message);
            }
        }
    }

    /// A table in a table.
    pub(crate) fn table<'a>(&mut self, table: &'a DeTable<'t>, key: &str) -> Option<(Range<usize>, &'a DeTable<'t>)> {
        let value = table.get(key)?;
        if let DeValue::Table(inner) = value.get_ref() {
            return Some((value.span(), inner));
        }
        self.wrong_type(value, key, &format!("a table: [{key}]"));
        None
    }

    /// Tables of one name: `[[key]]`.
    pub(crate) fn tables<'a>(&mut self, table: &'a DeTable<'t>, key: &str) -> Vec<(Range<usize>, &'a DeTable<'t>)> {
        let Some(value) = table.get(key) else { return Vec::new() };
        let wanted = format!("written as [[{key}]], with two brackets");
        let Some(list) = value.get_ref().as_array() else {
            self.wrong_type(value, key, &wanted);
            return Vec::new();
        };
        let mut found = Vec::new();
        for item in list.iter() {
            match item.get_ref() {
                DeValue::Table(inner) => found.push((item.span(), inner)),
                _ => self.wrong_type(item, key, &wanted),
            }
        }
        found
    }

    /// A text.
    pub(crate) fn text<'a>(&mut self, table: &'a DeTable<'t>, key: &str) -> Option<Placed<'a>> {
        let value = table.get(key)?;
        match value.get_ref() {
            DeValue::String(text) => Some((value.span(), text)),
            _ => {
                self.wrong_type(value, key, "a text in quotes");
                None
            }
        }
    }

    /// A text, or a list of texts that is not empty. `None` if the key is not there.
    pub(crate) fn texts<'a>(&mut self, table: &'a DeTable<'t>, key: &str) -> Option<Vec<Placed<'a>>> {
        let value = table.get(key)?;
        let items = match value.get_ref() {
            DeValue::String(text) => return Some(vec![(value.span(), text)]),
            DeValue::Array(items) => items,
            _ => {
                self.wrong_type(value, key, "a text in quotes or a list of such");
                return Some(Vec::new());
            }
        };
        let mut found = Vec::new();
        for item in items.iter() {
            match item.get_ref() {
                DeValue::String(text) => found.push((item.span(), &**text)),
                _ => self.wrong_type(item, key, "a list of texts in quotes"),
            }
        }
        Some(found)
    }

    /// `true` or `false`.
    pub(crate) fn flag(&mut self, table: &DeTable<'t>, key: &str) -> Option<bool> {
        let value = table.get(key)?;
        let flag = value.get_ref().as_bool();
        if flag.is_none() {
            self.wrong_type(value, key, "true or false");
        }
        flag
    }

    /// A whole number, not negative.
    pub(crate) fn number(&mut self, table: &DeTable<'t>, key: &str) -> Option<u64> {
        let value = table.get(key)?;
        let number = value.get_ref().as_integer();
        let number = number.and_then(|it| i64::from_str_radix(it.as_str(), it.radix()).ok());
        let number = number.and_then(|it| u64::try_from(it).ok());
        if number.is_none() {
            self.wrong_type(value, key, "a whole number, not negative");
        }
        number
    }

    /// One of some words.
    pub(crate) fn word<T: Copy>(&mut self, table: &DeTable<'t>, key: &str, words: &[(&str, T)]) -> Option<T> {
        let (at, text) = self.text(table, key)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning);
        if found.is_none() {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            let all = known.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
            let message = format!("`{key}` must be one of {all}, not {text:?}{}", suggestion(text, &known));
            self.problem(at, message);
        }
        found
    }

    /// A text with a meaning.
    pub(crate) fn parsed<T>(
        &mut self,
        table: &DeTable<'t>,
        key: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let (at, text) = self.text(table, key)?;
        read(text).map_err(|why| self.problem(at, format!("`{key}`: {why}"))).ok()
    }

    /// Notes that a value is of another type than the key takes.
    pub(crate) fn wrong_type(&mut self, value: &Spanned<DeValue<'_>>, key: &str, wanted: &str) {
        let found = match value.get_ref().type_str() {
            "integer" => "a number",
            "float" => "a broken number",
            "boolean" => "true or false",
            "datetime" => "a date",
            "array" => "a list",
            "table" => "a table",
            _ => "a text",
        };
        self.problem(value.span(), format!("`{key}` must be {wanted}, not {found}"));
    }
}

/// The known word that was probably meant, as the end of a message; nothing if none is near.
fn suggestion(word: &str, known: &[&str]) -> String {
    let other = OTHER_WORDS
        .iter()
        .find(|(wrong, right)| *wrong == word && right.split("` or `").all(|right| known.contains(&right)));
    if let Some((_, right)) = other {
        return format!("; did you mean `{right}`?");
    }
    let near = known.iter().map(|known| (distance(word, known), *known)).min();
    match near {
        Some((far, known)) if far <= 1 + known.len() / 4 => format!("; did you mean `{known}`?"),
        _ => String::new(),
    }
}

/// How many letters must be put in, taken out, replaced or exchanged with the next to get from one word to the other.
fn distance(one: &str, other: &str) -> usize {
    // Nobody mistypes a word of hundreds of letters.
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().take(64).collect(), other.chars().collect());
    let mut rows = vec![(0..=other.len()).collect::<Vec<usize>>()];
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let mut best = (rows[i][j] + usize::from(a != b)).min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && one[i - 1] == *b && other[j - 1] == *a {
                best = best.min(rows[i - 1][j - 1] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[one.len()][other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words() {
        assert_eq!((distance("exe", "exe"), distance("exee", "exe"), distance("eex", "exe")), (0, 1, 1));
        assert_eq!((distance("", "abc"), distance("abc", "")), (3, 3));
        let known = ["exe", "min_age", "max_age", "user"];
        assert_eq!(suggestion("exxe", &known), "; did you mean `exe`?");
        assert_eq!(suggestion("age", &known), "; did you mean `min_age` or `max_age`?");
        assert_eq!(suggestion("minage", &known), "; did you mean `min_age`?");
        assert_eq!(suggestion("colour", &known), "");
        assert_eq!(suggestion("size", &known), "", "not where neither is a key");
    }
}
