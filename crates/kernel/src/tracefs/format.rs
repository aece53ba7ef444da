//! How an event lies in a record: its `format` file.

/// One field of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Bytes from the begin of the record.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

impl Field {
    /// Its value in a record, without sign; `None` if the record is too short or it is no number.
    #[must_use]
    pub fn unsigned(self, record: &[u8]) -> Option<u64> {
        let bytes = record.get(self.offset..self.offset + self.size)?;
        match self.size {
            1 => Some(bytes[0].into()),
            2 => Some(u16::from_ne_bytes(bytes.try_into().ok()?).into()),
            4 => Some(u32::from_ne_bytes(bytes.try_into().ok()?).into()),
            8 => Some(u64::from_ne_bytes(bytes.try_into().ok()?)),
            _ => None,
        }
    }

    /// Its value in a record, with a sign.
    #[must_use]
    pub fn signed(self, record: &[u8]) -> Option<i64> {
        let value = self.unsigned(record)?;
        let unused = 64 - 8 * self.size;
        Some((value.cast_signed() << unused) >> unused)
    }
}

/// An event's fields by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    /// The number by which records name it.
    pub id: u16,
    fields: Vec<(String, Field)>,
}

impl Format {
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let text = str::from_utf8(text).ok()?;
        let id = text.lines().find_map(|line| line.strip_prefix("ID:"))?.trim().parse().ok()?;
        let fields = text.lines().filter_map(parse_field).collect();
        Some(Self { id, fields })
    }

    /// A field; `None` if this kernel's event has none of that name.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<Field> {
        self.fields.iter().find(|(known, _)| known == name).map(|(_, field)| *field)
    }
}

/// `field:unsigned long pfn; offset:16; size:8; signed:0;`, with tabs.
pub(super) fn parse_field(line: &str) -> Option<(String, Field)> {
    let mut parts = line.trim().split(';').map(str::trim);
    let name = parts.next()?.strip_prefix("field:")?.rsplit([' ', '*']).next()?;
    let name = name.split('[').next()?.to_owned();
    let mut number = |key: &str| parts.next()?.strip_prefix(key)?.parse().ok();
    let (offset, size) = (number("offset:")?, number("size:")?);
    Some((name, Field { offset, size }))
}
